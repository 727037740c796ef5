//! Takes no more requests, and tells when those taken are complete. Unlike a pause of the device, this lets a request that is
//! partly submitted go on, so that it ends.

use super::reply::PendingReply;
use super::{Device, Worker};
use crate::engine::vring::Vring;
use crate::sync::mpsc::Sender;

impl Worker {
    /// Submits nothing until it may go on. Replies when the device has no command of this worker.
    pub(super) fn pause(&mut self, answer: Sender<()>) {
        self.paused = true;
        self.pending.push(PendingReply::Pause(answer));
        self.poll_pending();
    }

    /// Takes no more requests until a release. Replies when every request taken has a used entry.
    pub(super) fn hold(&mut self, answer: Sender<()>) {
        self.path.held = true;
        self.pending.push(PendingReply::Hold(answer));
        self.poll_pending();
    }

    /// Takes requests again. Nobody waits for the reply to a hold any more.
    pub(super) fn release(&mut self) {
        self.path.held = false;
        self.pending.retain(|pending| !matches!(pending, PendingReply::Hold(_)));
    }

    /// True if requests may be submitted again after a reset. A hold waits for them however long they take, and a pause ends
    /// before they are submitted. Those of a ring that is being suspended are no longer there.
    pub(super) fn nobody_waits_for_failure(&self) -> bool {
        let waits = |pending: &PendingReply| {
            !matches!(pending, PendingReply::Hold(_) | PendingReply::Pause(_) | PendingReply::Suspend(..))
        };
        !self.pending.iter().any(waits)
    }

    /// True if the device has no command of this worker.
    pub(super) fn device_is_idle(&self) -> bool {
        match &self.device {
            Device::Live(queue) => queue.in_flight() == 0,
            Device::Resetting => false,
            Device::Failed => true,
        }
    }

    /// True if the device works and is idle, and no request is between its available and its used entry.
    pub(super) fn is_drained(&self) -> bool {
        let live = matches!(self.device, Device::Live(_));
        live && self.device_is_idle()
            && self.path.slots.iter().filter_map(|slot| slot.ring.as_ref()).all(Vring::is_drained)
    }
}
