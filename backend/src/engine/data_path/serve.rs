//! From a ring to requests: taken one by one, answered at once or started, as far as there is room.

use super::inflight::{InflightRequest, Place};
use super::{DataPath, Room, VringSlot};
use crate::driver::Queue;
use crate::engine::request::{Job, Status, Transfer, parse};
use crate::engine::vring::State;

impl DataPath {
    /// Takes what one ring offers, until there is no more of it or no more room.
    #[inline]
    pub(super) fn serve(&mut self, mut queue: Option<&mut dyn Queue>, slot: usize) -> Room {
        let VringSlot { enabled: true, ring: Some(ring) } = &mut self.slots[slot] else { return Room::Left };
        if ring.state != State::Serving {
            return Room::Left;
        }
        let offered = match ring.queue.available() {
            Ok(offered) => offered,
            Err(broken) => {
                self.fail_ring(slot, &broken);
                return Room::Left;
            }
        };
        // A driver that offers a chain again before it has come back could otherwise have more in flight than the ring holds.
        let count = offered.min(ring.queue.size() - ring.in_flight);
        for _ in 0..count {
            if let Some(queue) = &mut queue
                && let Some(room) = self.begin_fast(*queue, slot)
            {
                if room == Room::None {
                    return Room::None;
                }
                continue;
            }
            let Some(ring) = &mut self.slots[slot].ring else { break };
            match ring.queue.take(&mut self.guest, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(broken) => {
                    self.fail_ring(slot, &broken);
                    break;
                }
            }
            ring.in_flight += 1;
            // Not `Option::as_deref_mut`: the reborrow must be as short as the call.
            let device = queue.as_mut().map(|queue| &mut **queue as &mut dyn Queue);
            if self.begin(device, slot) == Room::None {
                return Room::None;
            }
        }
        Room::Left
    }

    /// Takes and starts the next request of a ring if it is the fast one.
    #[inline]
    fn begin_fast(&mut self, queue: &mut dyn Queue, slot: usize) -> Option<Room> {
        let ring = self.slots[slot].ring.as_mut()?;
        let fast = ring.queue.fast(&mut self.guest)?;
        let transfer = Transfer::of(&fast, &mut self.guest, &self.disk)?;
        ring.queue.take_fast(&fast);
        ring.in_flight += 1;
        let (index, Place { data, .. }) = self.inflight.vacant();
        data.ranges.clear();
        data.buffers.clear();
        data.buffers.push(transfer.data);
        let what = (transfer.operation, transfer.block, transfer.data.len());
        self.inflight.occupy(InflightRequest::new(transfer.pending_used(fast.head()), slot, what));
        Some(self.advance(queue, index))
    }

    /// Starts the request in `self.chain`.
    #[inline]
    fn begin(&mut self, queue: Option<&mut dyn Queue>, slot: usize) -> Room {
        let (index, place) = self.inflight.vacant();
        let (pending_used, job) = parse(&self.chain, &mut self.guest, &self.disk, &mut place.data);
        match job {
            Job::Device { operation, block, bytes } => {
                let Some(queue) = queue else {
                    self.answer(pending_used, slot, Status::IoError, 0);
                    return Room::Left;
                };
                self.inflight.occupy(InflightRequest::new(pending_used, slot, (operation, block, bytes)));
                return self.advance(queue, index);
            }
            Job::Identify => {
                let written = self.guest.scatter(&place.data.buffers, self.disk.id());
                self.answer(pending_used, slot, Status::Ok, written as u64);
            }
            Job::Answer(status) => self.answer(pending_used, slot, status, 0),
            Job::Refuse(fault) => {
                self.answer(pending_used, slot, Status::IoError, 0);
                self.log_fault(slot, &fault);
            }
        }
        Room::Left
    }
}
