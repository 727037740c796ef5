//! From a request to commands: as many as it takes, as far as there is room. Where a request stops for want of room, it is
//! resumed at its position, so nothing is submitted twice.

use super::bounce::{Bounce, Piece, SLOT_BYTES};
use super::cache_maintenance::CacheMaintenance;
use super::inflight::InflightRequest;
use super::{BOUNCED, DataPath, Room};
use crate::driver::{Command, Extent, Full, Queue};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::{self, Data, Disk, Operation};
use crate::engine::statistics::Counters;

impl DataPath {
    /// Submits what is left of a request.
    #[inline]
    pub(super) fn advance(&mut self, queue: &mut dyn Queue, index: u32) -> Room {
        let Self { inflight, caches, bounce, guest, counters, disk, half, .. } = self;
        let Some((inflight_request, data)) = inflight.get(index) else { return Room::Left };
        let mut tools = Tools { caches, bounce, guest, counters, disk };
        while !inflight_request.whole {
            let submitted = match inflight_request.operation {
                Operation::Read | Operation::Write => tools.submit_data(queue, inflight_request, data, index),
                _ => tools.submit_other(queue, inflight_request, data, index),
            };
            let Ok(amount) = submitted else {
                *half = Some(index);
                return Room::None;
            };
            inflight_request.submitted(amount);
            if inflight_request.whole {
                return Room::Left;
            }
        }
        // One that failed while the rest of it waited.
        if inflight_request.is_over() {
            self.finish(index);
        }
        Room::Left
    }
}

/// What a submission needs, beside the request.
struct Tools<'a> {
    caches: &'a CacheMaintenance,
    bounce: &'a mut Bounce,
    guest: &'a GuestMemoryView,
    counters: &'a Counters,
    disk: &'a Disk,
}

impl Tools<'_> {
    /// Submits the next command of a request that moves data; gives the bytes it covers.
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
        let Extent { bytes, direct, listed } = if caches.keep_apart(inflight_request.operation, buffers) {
            Extent { bytes: inflight_request.left(SLOT_BYTES), direct: false, listed: false }
        } else {
            queue.extent(buffers, position, SLOT_BYTES)
        };
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

    /// Submits the next command of a request that moves none; gives how much of the request it covers.
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
                let rest = rest.expect("the position is inside");
                let count = request::batch(rest, self.disk.discard_command.expect("offered, so it is there"));
                queue.discard(&rest[..count], index).map(|()| count as u64)
            }
            Operation::WriteZeroes { unmap } => {
                let next = request::next(
                    &data.ranges,
                    inflight_request.position >> shift,
                    self.disk.zeroes_command.expect("offered, so it is there").blocks,
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
