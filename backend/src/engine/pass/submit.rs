//! From a request to commands: as many as it takes, as far as there is room. Where a request stops for want of room, it is
//! resumed at its position, so nothing is submitted twice.

use super::super::bounce::{Bounce, Piece, SLOT_BYTES};
use super::super::caches::Caches;
use super::super::flights::Flight;
use super::super::guest::Guest;
use super::super::ranges;
use super::super::request::{Data, Disk, Operation};
use super::super::statistics::Counters;
use super::{BOUNCED, Path, Room};
use crate::driver::{Command, Extent, Full, Queue};

impl Path {
    /// Submits what is left of a request.
    #[inline]
    pub(super) fn advance(&mut self, queue: &mut dyn Queue, index: u32) -> Room {
        let Self { flights, caches, bounce, guest, counters, disk, half, .. } = self;
        let Some((flight, data)) = flights.get(index) else { return Room::Left };
        let mut tools = Tools { caches, bounce, guest, counters, disk };
        while !flight.whole {
            let submitted = match flight.operation {
                Operation::Read | Operation::Write => tools.submit_data(queue, flight, data, index),
                _ => tools.submit_other(queue, flight, data, index),
            };
            let Ok(amount) = submitted else {
                *half = Some(index);
                return Room::None;
            };
            flight.submitted(amount);
            if flight.whole {
                return Room::Left;
            }
        }
        // One that failed while the rest of it waited.
        if flight.is_over() {
            self.finish(index);
        }
        Room::Left
    }
}

/// What a submission needs, beside the request.
struct Tools<'a> {
    caches: &'a Caches,
    bounce: &'a mut Bounce,
    guest: &'a Guest,
    counters: &'a Counters,
    disk: &'a Disk,
}

impl Tools<'_> {
    /// Submits the next command of a request that moves data; gives the bytes it covers.
    #[inline]
    fn submit_data(&mut self, queue: &mut dyn Queue, flight: &Flight, data: &Data, index: u32) -> Result<u64, Full> {
        let Self { caches, bounce, guest, counters, disk } = self;
        let (buffers, position) = (&*data.buffers, flight.position);
        let Extent { bytes, direct, listed } = if caches.keep_apart(flight.operation, buffers) {
            Extent { bytes: flight.left(SLOT_BYTES), direct: false, listed: false }
        } else {
            queue.extent(buffers, position, SLOT_BYTES)
        };
        let command = disk.transfer(flight.operation, flight.block, position, bytes);
        if direct {
            queue.submit(command, buffers, position, bytes, index)?;
            caches.buffers(guest, buffers, position, bytes.into());
            if listed {
                counters.sgl.add(1);
            }
            return Ok(bytes.into());
        }
        let slot = bounce.take(Piece { flight: index, position, bytes }).ok_or(Full)?;
        if flight.operation == Operation::Write {
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
    fn submit_other(&self, queue: &mut dyn Queue, flight: &Flight, data: &Data, index: u32) -> Result<u64, Full> {
        let shift = self.disk.block_shift();
        match flight.operation {
            Operation::Discard => {
                let rest = usize::try_from(flight.position).ok().and_then(|position| data.ranges.get(position..));
                let rest = rest.expect("the position is inside");
                let count = ranges::batch(rest, self.disk.discard_command.expect("offered, so it is there"));
                queue.discard(&rest[..count], index).map(|()| count as u64)
            }
            Operation::WriteZeroes { unmap } => {
                let next = ranges::next(
                    &data.ranges,
                    flight.position >> shift,
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
