//! The worker's part in a reset of the device: its queue goes, and another comes or none.

use super::{DEVICE, Device, LOG, Worker};
use crate::driver::Queue;
use crate::engine::inflight_policy::InflightPolicy;

impl Worker {
    /// The queue, to be dropped by whoever resets the device: this thread may not unmap its memory.
    pub(super) fn give_queue(&mut self) -> Option<Box<dyn Queue>> {
        let Device::Live(queue) = std::mem::replace(&mut self.device, Device::Resetting) else { return None };
        if let Err(error) = self.poller.remove(queue.event()) {
            LOG.error(|| format!("stop watching the device's event: {error}"));
        }
        Some(queue)
    }

    pub(super) fn adopt_queue(&mut self, queue: Option<Box<dyn Queue>>, policy: InflightPolicy) {
        self.leave_suspended();
        // A stop or a memory removal is waiting for these requests: fail them instead of submitting them again.
        let wanted = queue.is_some() && self.nobody_waits_for_failure();
        self.path.handle_reset(if wanted { policy } else { InflightPolicy::Fail });
        self.device = match queue {
            None => Device::Failed,
            Some(queue) => {
                if let Err(error) = self.poller.add(queue.event(), DEVICE) {
                    LOG.error(|| format!("watch the device's event: {error}"));
                }
                Device::live(queue)
            }
        };
        self.poll_pending();
    }
}
