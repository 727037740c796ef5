//! Used entries reach the driver here, and while dirty pages are logged, what the worker and the device have written is marked
//! before that. Without a log, a request pays one comparison for it.

use super::DataPath;
use crate::addr::Gpa;
use crate::engine::dirty_log::DirtyLogging;
use crate::engine::request::pending_used::PendingUsed;

/// Of the data of a request in this slot of the inflight table, this many bytes may have been written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirtied {
    pub(super) index: u32,
    pub(super) bytes: u64,
}

impl DataPath {
    /// Publishes the used entries of every ring. Returns true if there were any.
    #[inline]
    pub(in crate::engine) fn publish(&mut self) -> bool {
        let mut any = false;
        for slot in 0..self.slots.len() {
            let Some(ring) = &mut self.slots[slot].ring else { continue };
            if !ring.can_publish() {
                continue;
            }
            any = true;
            let published = match &self.logging {
                None => {
                    ring.publish(&self.counters);
                    Ok(())
                }
                Some(logging) => ring.publish_logged(&self.counters, logging),
            };
            let count = &self.counters.rings[slot];
            count.completed.add(ring.completed);
            count.in_flight.set(ring.in_flight.into());
            ring.completed = 0;
            if let Err(fault) = published {
                self.fail_ring(slot, &fault);
            }
        }
        any
    }

    /// Marks what a request has written, before it gets its used entry.
    #[cold]
    #[inline(never)]
    pub(super) fn mark(&self, pending_used: &PendingUsed, dirtied: Option<Dirtied>) {
        let Some(logging) = &self.logging else { return };
        let data = dirtied.map(|Dirtied { index, bytes }| (&*self.inflight.data(index).buffers, bytes));
        logging.mark_request(pending_used.status(), data.unwrap_or_default());
    }

    /// Marks pages in another log from now on, or no longer.
    pub(in crate::engine) fn set_logging(&mut self, logging: Option<DirtyLogging>) {
        self.logging = logging;
        (0..self.slots.len()).for_each(|slot| self.follow_log(slot));
    }

    /// What the used ring in this slot is logged as, or that it is not.
    pub(in crate::engine) fn set_used_log(&mut self, slot: usize, used_log: Option<Gpa>) {
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.used_log = used_log;
        }
        self.follow_log(slot);
    }

    /// The log has changed, or the ring in this slot has been started and has recovered what the process before has left.
    pub(in crate::engine) fn follow_log(&mut self, slot: usize) {
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.follow_log(self.logging.as_ref());
        }
    }
}
