//! Splits a request into commands and submits them until the device queue is full. The request's position records how far it
//! came, so that submission continues there.

use super::bounce::{Bounce, Piece, SLOT_BYTES};
use super::cache_maintenance::CacheMaintenance;
use super::inflight::InflightRequest;
use super::{BOUNCED, Capacity, DataPath};
use crate::driver::{Command, Extent, Full, Queue};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::{self, Data, Disk, Operation};
use crate::engine::statistics::Counters;

impl DataPath {
    /// Submits the rest of a request.
    #[inline]
    pub(super) fn advance(&mut self, queue: &mut dyn Queue, index: u32) -> Capacity {
        let Self { inflight, caches, bounce, guest, counters, disk, partial, .. } = self;
        let Some((inflight_request, data)) = inflight.get(index) else { return Capacity::Available };
        let mut context = SubmitContext { caches, bounce, guest, counters, disk };
        while !inflight_request.fully_submitted {
            let submitted = match inflight_request.operation {
                Operation::Read | Operation::Write => context.submit_data(queue, inflight_request, data, index),
                _ => context.submit_other(queue, inflight_request, data, index),
            };
            let Ok(amount) = submitted else {
                *partial = Some(index);
                return Capacity::Exhausted;
            };
            inflight_request.add_command(amount);
            if inflight_request.fully_submitted {
                return Capacity::Available;
            }
        }
        // A command has failed while the rest of the request waited.
        if inflight_request.is_complete() {
            self.finish_now(index);
        }
        Capacity::Available
    }
}

/// The parts of the data path that a submission needs.
struct SubmitContext<'a> {
    caches: &'a CacheMaintenance,
    bounce: &'a mut Bounce,
    guest: &'a GuestMemoryView,
    counters: &'a Counters,
    disk: &'a Disk,
}

impl SubmitContext<'_> {
    /// Submits the next command of a read or write. Returns the bytes it covers.
    #[inline]
    fn submit_data(
        &mut self,
        queue: &mut dyn Queue,
        inflight_request: &InflightRequest,
        data: &Data,
        index: u32,
    ) -> Result<u64, Full> {
        let Self { caches, bounce, guest, counters, disk } = self;
        let (buffers, position) = (&*data.buffers, inflight_request.position);
        let Extent { bytes, direct, listed } = if caches.must_bounce(inflight_request.operation, buffers) {
            Extent { bytes: inflight_request.remaining(SLOT_BYTES), direct: false, listed: false }
        } else {
            queue.extent(buffers, position, SLOT_BYTES)
        };
        let bytes = disk.within_boundary(inflight_request.block, position, bytes);
        let command = disk.transfer(inflight_request.operation, inflight_request.block, position, bytes);
        if direct {
            queue.submit(command, buffers, position, bytes, index)?;
            caches.buffers(guest, buffers, position, bytes.into());
            if listed {
                counters.sgl.add(1);
            }
            return Ok(bytes.into());
        }
        let slot = bounce.take(Piece { inflight_request: index, position, bytes }).ok_or(Full)?;
        if inflight_request.operation == Operation::Write {
            guest.bounce(buffers, position, &bounce.slot(slot, bytes), false);
        }
        if let Err(full) = queue.submit(command, &[bounce.span(slot)], 0, bytes, BOUNCED | slot) {
            bounce.give_back(slot);
            return Err(full);
        }
        caches.slot(bounce, slot, bytes);
        counters.bounced.add(1);
        Ok(bytes.into())
    }

    /// Submits the next command of any other request. Returns how much of the request it covers.
    fn submit_other(
        &self,
        queue: &mut dyn Queue,
        inflight_request: &InflightRequest,
        data: &Data,
        index: u32,
    ) -> Result<u64, Full> {
        let shift = self.disk.block_shift();
        match inflight_request.operation {
            Operation::Discard => {
                let rest =
                    usize::try_from(inflight_request.position).ok().and_then(|position| data.ranges.get(position..));
                let rest = rest.expect("the position is below `bytes`");
                let count = request::batch(rest, self.disk.discard_command.expect("checked by ranges::job"));
                queue.discard(&rest[..count], index).map(|()| count as u64)
            }
            Operation::WriteZeroes { unmap } => {
                let next = request::next(
                    &data.ranges,
                    inflight_request.position >> shift,
                    self.disk.zeroes_command.expect("checked by ranges::job").blocks,
                );
                let command = Command::WriteZeroes { block: next.first, count: next.count, deallocate: unmap };
                queue.submit(command, &[], 0, 0, index).map(|()| u64::from(next.count) << shift)
            }
            Operation::Flush | Operation::Read | Operation::Write => {
                queue.submit(Command::Flush, &[], 0, 0, index).map(|()| 0)
            }
        }
    }
}
