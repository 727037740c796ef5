//! Splits a request into commands and submits them until the device queue is full. The request's position records how far it
//! came, so that submission continues there.

use super::bounce::{Bounce, Piece, SLOT_BYTES};
use super::cache_maintenance::CacheMaintenance;
use super::inflight::InflightRequest;
use super::{BOUNCED, Capacity, DataPath};
use crate::driver::{Command, Extent, Full, Queue};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::{self, Data, Disk, Operation, zones};
use crate::engine::statistics::Counters;

impl DataPath {
    /// Submits the rest of a request.
    #[inline]
    pub(super) fn advance(&mut self, queue: &mut dyn Queue, index: u32) -> Capacity {
        let Self { inflight, caches, bounce, guest, counters, disk, partial, .. } = self;
        let Some((inflight_request, data)) = inflight.get(index) else { return Capacity::Available };
        let mut context = SubmitContext { caches, bounce, guest, counters, disk };
        let in_order = context.disk.is_in_order(inflight_request.operation);
        while !inflight_request.fully_submitted {
            // `complete` continues the request.
            if inflight_request.must_wait(in_order) {
                return Capacity::Available;
            }
            if inflight_request.unsure {
                let asked = context.ask_for_write_pointer(queue, inflight_request, index).is_ok();
                if !asked {
                    *partial = Some(index);
                    return Capacity::Exhausted;
                }
                inflight_request.outstanding += 1;
                return Capacity::Available;
            }
            let submitted = match inflight_request.operation {
                Operation::Read | Operation::Write | Operation::ZoneAppend | Operation::ZoneReport => {
                    context.submit_data(queue, inflight_request, data, index)
                }
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
        let operation = inflight_request.operation;
        let bounced = || Extent { bytes: inflight_request.remaining(SLOT_BYTES), direct: false, listed: false };
        let extent = if operation == Operation::ZoneReport || caches.must_bounce(operation, buffers) {
            bounced()
        } else {
            queue.extent(buffers, position, SLOT_BYTES)
        };
        let Extent { bytes, direct, listed } = match operation {
            Operation::Read | Operation::Write => {
                Extent { bytes: disk.within_boundary(inflight_request.block, position, extent.bytes), ..extent }
            }
            // One command, which fits a slot.
            _ if u64::from(extent.bytes) < inflight_request.bytes => bounced(),
            _ => extent,
        };
        let command = disk.transfer(operation, inflight_request.block, position, bytes);
        if direct {
            queue.submit(command, buffers, position, bytes, index)?;
            caches.buffers(guest, buffers, position, bytes.into());
            if listed {
                counters.sgl.add(1);
            }
            return Ok(bytes.into());
        }
        let slot = bounce.take(Piece { inflight_request: index, position, bytes }).ok_or(Full)?;
        if !operation.writes_memory() {
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

    /// Submits a report of the zone of a write.
    #[cold]
    fn ask_for_write_pointer(
        &mut self,
        queue: &mut dyn Queue,
        inflight_request: &InflightRequest,
        index: u32,
    ) -> Result<(), Full> {
        let bytes = zones::ONE_ZONE;
        let slot = self.bounce.take(Piece { inflight_request: index, position: 0, bytes }).ok_or(Full)?;
        let command = Command::ZoneReport { block: inflight_request.block };
        if let Err(full) = queue.submit(command, &[self.bounce.span(slot)], 0, bytes, BOUNCED | slot) {
            self.bounce.give_back(slot);
            return Err(full);
        }
        self.caches.slot(self.bounce, slot, bytes);
        Ok(())
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
            Operation::ManageZone(action) => queue
                .submit(Command::ManageZone { block: inflight_request.block, action }, &[], 0, 0, index)
                .map(|()| 0),
            _ => queue.submit(Command::Flush, &[], 0, 0, index).map(|()| 0),
        }
    }
}
