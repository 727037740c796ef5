//! Completes short requests of one ring, one after the other: the counterpart of [`fast_run`](super::fast_run). What is the same
//! for all of them is looked up once, and they are counted together.

use super::DataPath;
use super::inflight::InflightTable;
use crate::driver::{Completion, Direction, Outcome};
use crate::engine::guest_memory::BatchView;
use crate::engine::request::Status;
use crate::engine::statistics::Counters;
use crate::engine::virtqueue::{FastRing, Virtqueue};

/// Requests of one direction that have been completed, and their bytes.
#[derive(Clone, Copy, Default)]
struct Moved {
    requests: u64,
    bytes: u64,
}

/// Reads and writes that have been completed and are not in the counters yet.
#[derive(Default)]
pub(super) struct Tally {
    reads: Moved,
    writes: Moved,
}

impl Tally {
    /// Counts a request for `bytes`. Returns how many of them were written to guest memory.
    #[inline(always)]
    pub(super) fn count(&mut self, direction: Direction, bytes: u64) -> u64 {
        let (of, written) = match direction {
            Direction::Read => (&mut self.reads, bytes),
            Direction::Write => (&mut self.writes, 0),
        };
        of.requests += 1;
        of.bytes += bytes;
        written
    }

    /// Adds them to the counters.
    #[inline(always)]
    pub(super) fn add_to(self, counters: &Counters) {
        let Self { reads, writes } = self;
        if reads.requests != 0 {
            counters.reads.add(reads.requests);
            counters.bytes_read.add(reads.bytes);
        }
        if writes.requests != 0 {
            counters.writes.add(writes.requests);
            counters.bytes_written.add(writes.bytes);
        }
    }
}

impl DataPath {
    /// Completes the first requests of `batch`, as far as they are short, have succeeded and are of one ring. Nothing but their
    /// status, their used entries and the counters is needed: see [`Self::is_plain`]. Returns how many.
    #[inline(always)]
    pub(super) fn finish_run(&mut self, batch: &[Completion]) -> usize {
        let Self { slots, guest, inflight, counters, .. } = self;
        let Some(slot) = batch.first().and_then(|first| inflight.ring_of_short(first.tag)) else { return 0 };
        let (Some(ring), Some(guest)) = (&mut slots[slot].ring, guest.batch()) else { return 0 };
        let mut run = FinishRun { guest, inflight, slot, tally: Tally::default() };
        let finished = match &mut ring.queue {
            Virtqueue::Split(ring) => run.run(ring, batch),
            Virtqueue::Packed(ring) => run.run(ring, batch),
        };
        ring.in_flight -= finished;
        ring.completed += u64::from(finished);
        run.tally.add_to(counters);
        finished.into()
    }
}

struct FinishRun<'a> {
    guest: BatchView<'a>,
    inflight: &'a mut InflightTable,
    /// The slot of the ring.
    slot: usize,
    tally: Tally,
}

impl FinishRun<'_> {
    /// Returns how many it has completed. Not inlined, so that there are registers enough.
    #[inline(never)]
    fn run(&mut self, ring: &mut impl FastRing, batch: &[Completion]) -> u16 {
        let Self { guest, inflight, slot, tally } = self;
        let mut finished = 0;
        for completion in batch {
            if completion.outcome != Outcome::Success {
                break;
            }
            let answered = |of: usize, status| of == *slot && guest.write_status(status, Status::Ok as u8);
            let Some(short) = inflight.remove_short(completion.tag, answered) else { break };
            let written = tally.count(short.direction, short.bytes);
            ring.push_used(short.head, u32::try_from(written + 1).unwrap_or(u32::MAX));
            finished += 1;
        }
        finished
    }
}
