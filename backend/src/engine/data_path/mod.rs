//! One worker's data path without its thread: what happens in a pass over the device and the rings. A pass never waits;
//! what cannot go on now (device queue full, no bounce slot) is kept half-submitted and goes on after completions.
//!
//! ```text
//!  available -> take -> parse -+-> answer at once ----------------------------+
//!                              +-> InflightRequest -> submit .. ring -> (device) -> reap -> used ring -> call
//! ```
//! At most one request is half-submitted: behind it nothing is taken, so order of service stays fair and nothing starves.

mod bounce;
mod cache_maintenance;
mod inflight;
mod layout;
mod serve;
mod submit;

use std::sync::Arc;

pub(super) use bounce::Bounce;
pub(super) use cache_maintenance::CacheMaintenance;
pub(super) use layout::{VringSlot, WorkerLayout};

use super::guest_memory::GuestMemoryView;
use super::inflight_policy::InflightPolicy;
use super::request::pending_used::PendingUsed;
use super::request::{Disk, Operation, RequestFault, Status};
use super::statistics::Counters;
use super::virtqueue::chain::{Chain, ChainFault};
use super::vring::{State, Vring};
use crate::driver::{Command, Completion, Outcome, Queue};
use crate::rate_limited_log::RateLimitedLog;
use crate::sys::LostPages;
use inflight::InflightTable;

/// Set in the tag of a command that goes through a bounce slot; the rest is the slot, else the request.
const BOUNCED: u32 = 1 << 31;

/// The tag of a flush that no request asked for.
const OWN_FLUSH: u32 = BOUNCED - 1;

/// Where a flush that no request asked for stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnFlush {
    Wanted,
    Submitted,
    Over(bool),
}

/// Everything of a worker but its thread and its device queue.
pub(in crate::engine) struct DataPath {
    pub(in crate::engine) slots: Vec<VringSlot>,
    pub(in crate::engine) guest: GuestMemoryView,
    pub(in crate::engine) inflight: InflightTable,
    pub(in crate::engine) counters: Arc<Counters>,
    bounce: Bounce,
    caches: CacheMaintenance,
    disk: Disk,
    chain: Chain,
    wrong_requests: RateLimitedLog,
    broken_rings: RateLimitedLog,
    own_flush: Option<OwnFlush>,
    /// The request whose rest waits for room.
    half: Option<u32>,
    /// Requests to be submitted once more.
    again: Vec<u32>,
    /// Where the next pass starts, so that a full device does not always favour the same ring.
    turn: usize,
    /// Names the rings in the log: virtqueue = slot × workers + worker.
    worker: usize,
    workers: usize,
}

/// How far a submission came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Left,
    None,
}

impl DataPath {
    pub(in crate::engine) fn new(
        post: &WorkerLayout,
        disk: Disk,
        bounce: Bounce,
        caches: CacheMaintenance,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            slots: (0..post.slots).map(|_| VringSlot::default()).collect(),
            guest: GuestMemoryView::default(),
            inflight: InflightTable::default(),
            counters,
            bounce,
            caches,
            disk,
            chain: Chain::default(),
            wrong_requests: RateLimitedLog::new(module_path!()),
            broken_rings: RateLimitedLog::new(module_path!()),
            own_flush: None,
            half: None,
            again: Vec::new(),
            turn: 0,
            worker: post.worker,
            workers: post.workers,
        }
    }

    /// The rings that new requests are taken from.
    pub(in crate::engine) fn served(&self) -> impl Iterator<Item = &Vring> {
        let enabled = self.slots.iter().filter(|slot| slot.enabled);
        enabled.filter_map(|slot| slot.ring.as_ref()).filter(|ring| ring.state == State::Serving)
    }

    /// Takes all completions; true if there were any.
    #[inline]
    pub(in crate::engine) fn reap(&mut self, queue: &mut dyn Queue) -> bool {
        let mut any = false;
        queue.reap(&mut |completion| {
            any = true;
            self.complete(completion);
        });
        any
    }

    /// Takes every available request and submits it, as far as there is room. True if the device has something new.
    #[inline]
    pub(in crate::engine) fn submit(&mut self, queue: &mut dyn Queue) -> bool {
        let before = queue.in_flight();
        if self.own_flush == Some(OwnFlush::Wanted) && queue.submit(Command::Flush, &[], 0, 0, OWN_FLUSH).is_ok() {
            self.own_flush = Some(OwnFlush::Submitted);
        }
        while let Some(index) = self.half.take().or_else(|| self.again.pop()) {
            if self.advance(queue, index) == Room::None {
                return queue.in_flight() != before;
            }
        }
        let (slots, mut slot) = (self.slots.len(), self.turn);
        for _ in 0..slots {
            let room = self.serve(Some(&mut *queue), slot);
            slot = if slot + 1 < slots { slot + 1 } else { 0 };
            if room == Room::None {
                self.turn = slot;
                break;
            }
        }
        queue.in_flight() != before
    }

    /// From now on a flush is on its way; see [`Self::flushed`].
    pub(in crate::engine) fn wants_flush(&mut self) {
        self.own_flush = Some(OwnFlush::Wanted);
    }

    /// How the flush ended, once it has.
    pub(in crate::engine) fn flushed(&mut self) -> Option<bool> {
        let Some(OwnFlush::Over(done)) = self.own_flush else { return None };
        self.own_flush = None;
        Some(done)
    }

    /// A flush that is not over has failed; true if there was one.
    fn fail_flush(&mut self) -> bool {
        let pending = matches!(self.own_flush, Some(OwnFlush::Wanted | OwnFlush::Submitted));
        if pending {
            self.own_flush = Some(OwnFlush::Over(false));
        }
        pending
    }

    /// Takes every available request and fails it: there is no device. True if somebody else waits for that.
    pub(in crate::engine) fn refuse(&mut self) -> bool {
        for slot in 0..self.slots.len() {
            self.serve(None, slot);
        }
        self.fail_flush()
    }

    /// Publishes the used entries of every ring that has any; true if there were some.
    #[inline]
    pub(in crate::engine) fn publish(&mut self) -> bool {
        let mut any = false;
        for slot in &mut self.slots {
            if let Some(ring) = &mut slot.ring
                && ring.queue.has_unpublished()
            {
                ring.publish(&self.counters);
                any = true;
            }
        }
        any
    }

    /// Ends what the requests in flight had of the device, which has been reset and touches their memory no more: fails
    /// them, or lets them begin again if they have not before.
    pub(in crate::engine) fn abandon(&mut self, policy: InflightPolicy) {
        self.half = None;
        self.again.clear();
        self.fail_flush();
        self.bounce.give_back_all();
        for index in self.inflight.names() {
            if let Some((inflight_request, _)) = self.inflight.get(index) {
                if policy == InflightPolicy::Resubmit && inflight_request.restart() {
                    self.again.push(index);
                    self.counters.resubmitted.add(1);
                    continue;
                }
                inflight_request.outcome = Outcome::Failed;
            }
            self.finish(index);
        }
    }

    /// Takes note of a finished command, and of the end of its request.
    #[inline]
    fn complete(&mut self, completion: Completion) {
        let Completion { tag, outcome } = completion;
        if tag == OWN_FLUSH {
            self.own_flush = Some(OwnFlush::Over(outcome == Outcome::Success));
            return;
        }
        let (index, piece) = if tag & BOUNCED == 0 {
            (tag, None)
        } else {
            match self.bounce.give_back(tag & !BOUNCED) {
                Some(piece) => (piece.inflight_request, Some(piece)),
                None => return log::error!("the device completed a bounced command that was not submitted"),
            }
        };
        let Some((inflight_request, data)) =
            self.inflight.get(index).filter(|(inflight_request, _)| inflight_request.outstanding != 0)
        else {
            return log::error!("the device completed a command that was not submitted");
        };
        if let Some(piece) = piece
            && inflight_request.operation == Operation::Read
            && outcome == Outcome::Success
        {
            self.caches.slot(&self.bounce, tag & !BOUNCED, piece.bytes);
            let slot = self.bounce.slot(tag & !BOUNCED, piece.bytes);
            self.guest.bounce(&data.buffers, piece.position, &slot, true);
        }
        inflight_request.note(outcome);
        // A half-submitted request is finished where it is resumed.
        if inflight_request.is_over() && self.half != Some(index) {
            self.finish(index);
        }
    }

    /// Answers a request that the device is done with.
    #[inline]
    fn finish(&mut self, index: u32) {
        let Some((inflight_request, data)) = self.inflight.remove(index) else { return };
        if inflight_request.operation == Operation::Read {
            self.caches.buffers(&self.guest, &data.buffers, 0, inflight_request.bytes);
        }
        let success = inflight_request.outcome == Outcome::Success;
        let moved = if success { inflight_request.bytes } else { 0 };
        let counters = &self.counters;
        let (status, written) = match inflight_request.operation {
            Operation::Read => {
                counters.reads.add(1);
                counters.bytes_read.add(moved);
                (inflight_request.outcome, moved)
            }
            Operation::Write => {
                counters.writes.add(1);
                counters.bytes_written.add(moved);
                (inflight_request.outcome, 0)
            }
            Operation::Flush => {
                counters.flushes.add(1);
                (inflight_request.outcome, 0)
            }
            Operation::Discard => {
                counters.discards.add(1);
                (inflight_request.outcome, 0)
            }
            Operation::WriteZeroes { .. } => {
                counters.write_zeroes.add(1);
                (inflight_request.outcome, 0)
            }
        };
        let status = match status {
            Outcome::Success => Status::Ok,
            Outcome::Unsupported => Status::Unsupported,
            Outcome::Failed => Status::IoError,
        };
        self.answer(inflight_request.pending_used, inflight_request.ring, status, written);
    }

    /// Writes the status and then the used entry; `written` bytes of data went into the chain before.
    #[inline]
    fn answer(&mut self, pending_used: PendingUsed, slot: usize, status: Status, written: u64) {
        if status != Status::Ok {
            self.counters.errors.add(1);
        }
        let len = match pending_used.status() {
            Some(byte) => {
                self.guest.write_status(byte, status as u8);
                u32::try_from(written + 1).unwrap_or(u32::MAX)
            }
            None => 0,
        };
        let head = pending_used.complete();
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.queue.push_used(head, len);
            ring.in_flight -= 1;
        }
    }

    #[cold]
    fn log_fault(&mut self, slot: usize, fault: &RequestFault) {
        let virtqueue = self.virtqueue(slot);
        // The likeliest cause is not the guest's: RAM that it has and the front-end does not share with us.
        let hint = || match fault {
            RequestFault::Memory { .. } | RequestFault::Chain(ChainFault::IndirectMemory(_)) => format!(
                "; shared is {}: if the guest has RAM there, such as a DIMM or a NUMA node, give its memory backend share=on",
                self.guest.table()
            ),
            _ => String::new(),
        };
        self.wrong_requests.warn(|| format!("virtqueue {virtqueue}: request refused: {fault}{}", hint()));
    }

    #[cold]
    pub(in crate::engine) fn fail_ring(&mut self, slot: usize, why: &dyn std::fmt::Display) {
        let virtqueue = self.virtqueue(slot);
        let line = || format!("virtqueue {virtqueue}: {why}{LostPages}; it is not served until it is restarted");
        self.broken_rings.error(line);
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.fail();
        }
    }

    /// The virtqueue that has this slot.
    pub(in crate::engine) fn virtqueue(&self, slot: usize) -> usize {
        slot * self.workers + self.worker
    }
}
