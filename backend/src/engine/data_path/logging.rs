//! Used entries reach the driver here, and while dirty pages are logged, what the worker and the device have written is marked
//! before that. Without a log, a request pays one comparison for it.

use super::DataPath;
use crate::addr::Gpa;
use crate::engine::dirty_log::DirtyLogging;
use crate::engine::request::Operation;

/// What may have been written to the buffers of the request in this slot of the inflight table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirtied {
    index: u32,
    part: Part,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// This many bytes of the data.
    Data(u64),
    /// The sector at which an append has written (virtio 1.3 §5.2.6).
    AppendSector,
}

impl Dirtied {
    /// The first `bytes` of the data.
    pub(super) fn data(index: u32, bytes: u64) -> Self {
        Self { index, part: Part::Data(bytes) }
    }

    /// By a request for `bytes` in slot `index`, whether it has failed or not: a read that fails may have written as well.
    #[inline]
    pub(super) fn by(operation: Operation, bytes: u64, index: u32) -> Option<Self> {
        if operation == Operation::Read || operation == Operation::ZoneReport {
            return Some(Self::data(index, bytes));
        }
        (operation == Operation::ZoneAppend).then_some(Self { index, part: Part::AppendSector })
    }
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
    pub(super) fn mark(&self, status_byte: Option<Gpa>, dirtied: Option<Dirtied>) {
        let Some(logging) = &self.logging else { return };
        let data = dirtied.map(|Dirtied { index, part }| {
            let data = self.inflight.data(index);
            match part {
                Part::Data(bytes) => (&*data.buffers, bytes),
                Part::AppendSector => (&*data.append_sector, u64::MAX),
            }
        });
        logging.mark_request(&self.guest, status_byte, data.unwrap_or_default());
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
