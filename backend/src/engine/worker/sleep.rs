//! How a worker sleeps: no notification may be lost that comes while it arms them.

use std::time::{Duration, Instant};

use super::spin::Awaited;
use super::{COMMANDS, DEVICE, Device, LOG, Worker};
use crate::engine::vring::Vring;
use crate::eventfd::drain;
use crate::sync::thread;

impl Worker {
    /// The worker has found nothing to do, for the first time since it had something.
    pub(super) fn begin_wait(&mut self, now: Instant) -> Instant {
        self.spin.begin(match &self.device {
            Device::Live(queue) if queue.in_flight() > 0 => Awaited::Device,
            Device::Live(_) | Device::Resetting | Device::Failed => Awaited::Driver,
        });
        now
    }

    /// True if a ring has no kick eventfd, so that nothing would wake the worker.
    pub(super) fn must_poll(&self) -> bool {
        self.path.served().any(Vring::is_polled)
    }

    /// Arms every notification, polls once more, and waits. `since`: when this wait began.
    pub(super) fn sleep(&mut self, since: Instant) {
        if let Device::Live(queue) = &self.device {
            let completed = std::mem::take(&mut self.event_stale);
            if completed {
                drain(queue.event());
            }
            self.poll_timer.adjust(completed);
            queue.set_interrupt_wanted(true);
        }
        self.path.served().for_each(|ring| ring.queue.arm());
        // Chains offered before arming bring no kick. This pass takes them.
        if !self.pass() && self.wait() {
            self.spin.slept(since.elapsed());
        }
        self.path.served().for_each(|ring| ring.queue.disarm());
        if let Device::Live(queue) = &self.device {
            queue.set_interrupt_wanted(false);
        }
    }

    /// Returns true if something happened. Nothing has if the time is over, or the worker polls a device that does not interrupt.
    fn wait(&mut self) -> bool {
        self.path.report_depths();
        let Self { poller, path, device, event_stale, clock, poll_timer, .. } = self;
        let longest = match device {
            Device::Live(queue) => poll_timer.longest_sleep(&**queue, clock.tick()),
            Device::Resetting | Device::Failed => None,
        };
        let mut unreadable = Vec::new();
        let waited = poller.wait(longest, |event| match event.token {
            COMMANDS => {} // drained by `CommandQueue::take`
            DEVICE => {
                if let Device::Live(queue) = device {
                    drain(queue.event());
                    *event_stale = false;
                }
            }
            slot => {
                path.counters.kicks.add(1);
                let ring = usize::try_from(slot).ok().and_then(|slot| path.slots.get(slot)?.ring.as_ref());
                if ring.is_some_and(|ring| !ring.drain_kick()) {
                    unreadable.push(slot);
                }
            }
        });
        if let Err(error) = &waited {
            LOG.error(|| format!("wait for notifications: {error}; polling instead"));
            thread::sleep(Duration::from_millis(1));
        }
        for slot in unreadable.into_iter().filter_map(|slot| usize::try_from(slot).ok()) {
            self.path.fail_ring(slot, &"its kick descriptor cannot be read");
            if let Some(ring) = &mut self.path.slots[slot].ring {
                ring.unwatch(&self.poller);
            }
        }
        waited.is_ok_and(|events| events > 0)
    }
}
