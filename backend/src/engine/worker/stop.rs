//! The end of a ring: drained, or with its requests in flight left to the record.

use super::reply::{PendingReply, reply};
use super::{State, Worker};
use crate::engine::suspension::{Stopped, Suspension};
use crate::sync::mpsc::Sender;

impl Worker {
    pub(super) fn stop(&mut self, slot: usize, answer: Sender<Option<u32>>) {
        match &mut self.path.slots[slot].ring {
            None => reply(&answer, None),
            Some(ring) => {
                ring.state = State::Draining;
                self.pending.push(PendingReply::Stop(slot, answer));
                self.poll_pending();
            }
        }
    }

    /// Stops a ring whose requests in flight are recorded. They complete, or a reset ends their commands.
    pub(super) fn suspend(&mut self, slot: usize, answer: Sender<Suspension>) {
        match &mut self.path.slots[slot].ring {
            None => reply(&answer, Suspension::NotStarted),
            Some(ring) if !ring.queue.is_recorded() => reply(&answer, Suspension::NotRecorded),
            Some(ring) => {
                ring.suspend();
                if !ring.is_drained() {
                    reply(&answer, Suspension::Waiting);
                }
                self.pending.push(PendingReply::Suspend(slot, answer));
                self.poll_pending();
            }
        }
    }

    /// Leaves the requests of the rings that are being suspended to their records. The device has been reset.
    pub(super) fn leave_suspended(&mut self) {
        for pending in &self.pending {
            if let PendingReply::Suspend(slot, _) = pending {
                self.path.leave_recorded(*slot);
            }
        }
    }

    /// Ends a ring that has nothing in flight. `None` if it has.
    pub(super) fn end_drained(&mut self, slot: usize) -> Option<Stopped> {
        let mut ring = self.path.slots[slot].ring.take_if(|ring| ring.is_drained())?;
        ring.unwatch(&self.poller);
        ring.queue.arm(); // the next device on the ring expects kicks
        Some(Stopped { base: ring.queue.base(), left: ring.left })
    }
}
