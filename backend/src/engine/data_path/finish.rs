//! The end of a request: counters, status, used entry.

use super::finish_run::Tally;
use super::inflight::Finished;
use super::logging::Dirtied;
use super::{DataPath, zones};
use crate::addr::Gpa;
use crate::driver::{Direction, Outcome};
use crate::engine::request::pending_used::PendingUsed;
use crate::engine::request::{Disk, Operation, Status};
use crate::engine::virtqueue::chain::Head;

impl DataPath {
    /// Completes a request that the device has finished. Always inlined, like [`Self::answer`]: as calls they would copy the
    /// request.
    #[inline(always)]
    pub(super) fn finish(&mut self, index: u32) {
        let Some((finished, data)) = self.inflight.remove(index) else { return };
        let Finished { pending_used, ring, operation, bytes, outcome, started } = finished;
        // From here on in registers; what has to be dropped would stay in memory.
        let (status_byte, head) = (pending_used.status(), pending_used.complete());
        if matches!(operation, Operation::Read) {
            self.caches.buffers(&self.guest, &data.buffers, 0, bytes);
        }
        let dirtied = self.logging.as_ref().and_then(|_| Dirtied::by(operation, bytes, index));
        if let Some(ns) = self.clock.since(started) {
            self.counters.latencies.record(operation, ns);
        }
        let (status, moved) = match outcome {
            Outcome::Success => (Status::Ok, bytes),
            _ => (status_of(outcome, &self.disk), 0),
        };
        let written = match operation {
            Operation::Read => self.count_transfer(Direction::Read, moved),
            Operation::Write => self.count_transfer(Direction::Write, moved),
            _ => {
                let written = zones::written(operation, moved, data);
                self.count_other(operation, moved);
                written
            }
        };
        self.return_chain((head, status_byte), ring, status, written, dirtied);
    }

    /// True if a request that has succeeded needs nothing but its status, its used entry and the counters.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.logging.is_none() && self.clock.now == 0
    }

    /// [`Self::finish`] where it is rare.
    #[inline(never)]
    pub(super) fn finish_now(&mut self, index: u32) {
        self.finish(index);
    }

    /// [`Self::answer`] where it is rare.
    #[inline(never)]
    pub(super) fn answer_now(
        &mut self,
        pending_used: PendingUsed,
        slot: usize,
        status: Status,
        written: u64,
        dirtied: Option<Dirtied>,
    ) {
        self.answer(pending_used, slot, status, written, dirtied);
    }

    /// Counts a read or write of `moved` bytes. Returns how many of them were written to guest memory.
    #[inline(always)]
    fn count_transfer(&self, direction: Direction, moved: u64) -> u64 {
        let mut tally = Tally::default();
        let written = tally.count(direction, moved);
        tally.add_to(&self.counters);
        written
    }

    #[inline(never)]
    fn count_other(&self, operation: Operation, moved: u64) {
        match operation {
            Operation::Flush => self.counters.flushes.add(1),
            Operation::Discard => self.counters.discards.add(1),
            Operation::WriteZeroes { .. } => self.counters.write_zeroes.add(1),
            Operation::Read | Operation::Write => {}
            operation => zones::count(&self.counters, operation, moved),
        }
    }

    /// Writes the status, then the used entry. `written` bytes of data were written to the chain before, perhaps more than that:
    /// `dirtied`.
    #[inline(always)]
    pub(super) fn answer(
        &mut self,
        pending_used: PendingUsed,
        slot: usize,
        status: Status,
        written: u64,
        dirtied: Option<Dirtied>,
    ) {
        let status_byte = pending_used.status();
        self.return_chain((pending_used.complete(), status_byte), slot, status, written, dirtied);
    }

    /// The same, for a chain whose pending used entry this completes.
    #[inline(always)]
    fn return_chain(
        &mut self,
        (head, status_byte): (Head, Option<Gpa>),
        slot: usize,
        status: Status,
        written: u64,
        dirtied: Option<Dirtied>,
    ) {
        if status != Status::Ok {
            self.counters.errors.add(1);
        }
        let len = match status_byte {
            Some(byte) => {
                self.guest.write_status(byte, status as u8);
                u32::try_from(written + 1).unwrap_or(u32::MAX)
            }
            None => 0,
        };
        if self.logging.is_some() {
            self.mark(status_byte, dirtied);
        }
        self.push_used(slot, head, len);
    }

    /// Pushes a used entry to the ring in `slot`, for a chain with `len` bytes written to it.
    #[inline(always)]
    fn push_used(&mut self, slot: usize, head: Head, len: u32) {
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.queue.push_used(head, len);
            ring.in_flight -= 1;
            ring.completed += 1;
        }
    }
}

/// The status of a request that has failed.
#[cold]
fn status_of(outcome: Outcome, disk: &Disk) -> Status {
    match outcome {
        Outcome::Success => Status::Ok,
        Outcome::Unsupported => Status::Unsupported,
        Outcome::Failed => Status::IoError,
        Outcome::Zone(fault) => disk.zone_status(fault),
    }
}
