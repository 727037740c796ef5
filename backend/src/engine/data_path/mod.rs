//! One worker's data path, without its thread: a pass over the device and the rings. A pass never waits. A request that cannot
//! be submitted completely (device queue full, no bounce slot) is continued after completions.
//!
//! ```text
//!  available -> take -> parse -+-> answer at once ----------------------------+
//!                              +-> InflightRequest -> submit .. ring -> (device) -> reap -> used ring -> call
//! ```
//! At most one request is partly submitted. Nothing is taken until it is submitted completely, so no request starves.

mod bounce;
mod cache_maintenance;
mod fast_run;
mod finish;
mod finish_run;
mod inflight;
mod layout;
mod logging;
mod serve;
mod submit;
mod zones;

use std::sync::Arc;

pub(super) use bounce::Bounce;
pub(super) use cache_maintenance::CacheMaintenance;
pub(super) use layout::{VringSlot, WorkerLayout};
#[cfg(test)]
pub(super) use serve::BATCH;

use super::dirty_log::DirtyLogging;
use super::guest_memory::GuestMemoryView;
use super::inflight_policy::InflightPolicy;
use super::inflight_region::{InflightRegion, Tracking};
use super::latency::RequestClock;
use super::request::{Disk, Operation, RequestFault};
use super::statistics::Counters;
use super::virtqueue::chain::{Chain, ChainFault};
use super::vring::{State, Vring};
use crate::driver::{Command, Completion, Outcome, Queue};
use crate::rate_limited_log::RateLimitedLog;
use crate::sys::LostPages;
use inflight::{InflightRequest, InflightTable};

/// Set in the tag of a bounced command. The other bits are the bounce slot; without this flag, the index of the request.
const BOUNCED: u32 = 1 << 31;

/// The tag of the engine's own flush, which belongs to no request.
const INTERNAL_FLUSH: u32 = BOUNCED - 1;

/// The state of the engine's own flush.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InternalFlush {
    Wanted,
    Submitted,
    Done(bool),
}

/// A worker's state, except its thread and its device queue.
pub(in crate::engine) struct DataPath {
    pub(in crate::engine) slots: Vec<VringSlot>,
    pub(in crate::engine) guest: GuestMemoryView,
    pub(in crate::engine) inflight: InflightTable,
    pub(in crate::engine) counters: Arc<Counters>,
    /// True while no request is taken.
    pub(in crate::engine) held: bool,
    pub(in crate::engine) clock: RequestClock,
    /// `None` while dirty pages are not logged.
    logging: Option<DirtyLogging>,
    bounce: Bounce,
    caches: CacheMaintenance,
    disk: Disk,
    chain: Chain,
    request_fault_log: RateLimitedLog,
    ring_fault_log: RateLimitedLog,
    internal_flush: Option<InternalFlush>,
    /// The partly submitted request.
    partial: Option<u32>,
    /// Requests to submit again after a reset, and those whose next command has waited for the one before.
    resubmit: Vec<u32>,
    /// Of the last call of [`Self::reap`]: kept for its memory.
    completions: Vec<Completion>,
    /// Where the next pass starts, so that a full device does not favour one ring.
    next_slot: usize,
    /// Virtqueue = slot × workers + worker.
    worker: usize,
    workers: usize,
}

/// Whether the device queue and the bounce buffer can take more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Capacity {
    Available,
    Exhausted,
}

impl DataPath {
    pub(in crate::engine) fn new(
        layout: &WorkerLayout,
        disk: Disk,
        bounce: Bounce,
        caches: CacheMaintenance,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            slots: (0..layout.slots).map(|_| VringSlot::default()).collect(),
            guest: GuestMemoryView::default(),
            inflight: InflightTable::default(),
            counters,
            held: false,
            clock: RequestClock::new(),
            logging: None,
            bounce,
            caches,
            disk,
            chain: Chain::default(),
            request_fault_log: RateLimitedLog::new(module_path!()),
            ring_fault_log: RateLimitedLog::new(module_path!()),
            internal_flush: None,
            partial: None,
            resubmit: Vec::new(),
            completions: Vec::new(),
            next_slot: 0,
            worker: layout.worker,
            workers: layout.workers,
        }
    }

    /// The rings from which new requests are taken.
    pub(in crate::engine) fn served(&self) -> impl Iterator<Item = &Vring> {
        let enabled = self.slots.iter().filter(|slot| slot.enabled);
        enabled.filter_map(|slot| slot.ring.as_ref()).filter(|ring| ring.state == State::Serving)
    }

    /// Handles all completions. Returns true if there were any.
    #[inline]
    pub(in crate::engine) fn reap(&mut self, queue: &mut dyn Queue) -> bool {
        let mut batch = std::mem::take(&mut self.completions);
        let count = queue.reap_batch(&mut batch);
        let plain = self.is_plain();
        let mut left = &batch[..count];
        while let [first, others @ ..] = left {
            left = match if plain { self.finish_run(left) } else { 0 } {
                0 => {
                    self.complete(*first);
                    others
                }
                finished => &left[finished..],
            };
        }
        self.completions = batch;
        count != 0
    }

    /// Submits available requests until the device queue is full. Returns true if commands were submitted.
    #[inline]
    pub(in crate::engine) fn submit(&mut self, queue: &mut dyn Queue) -> bool {
        let before = queue.in_flight();
        if self.internal_flush == Some(InternalFlush::Wanted)
            && queue.submit(Command::Flush, &[], 0, 0, INTERNAL_FLUSH).is_ok()
        {
            self.internal_flush = Some(InternalFlush::Submitted);
        }
        while let Some(index) = self.partial.take().or_else(|| self.resubmit.pop()) {
            if self.advance(queue, index) == Capacity::Exhausted {
                return queue.in_flight() != before;
            }
        }
        let (slots, mut slot) = (if self.held { 0 } else { self.slots.len() }, self.next_slot);
        for _ in 0..slots {
            let capacity = self.serve(Some(&mut *queue), slot);
            slot = if slot + 1 < slots { slot + 1 } else { 0 };
            if capacity == Capacity::Exhausted {
                self.next_slot = slot;
                break;
            }
        }
        queue.in_flight() != before
    }

    /// Starts a flush. [`Self::flushed`] returns its result.
    pub(in crate::engine) fn request_flush(&mut self) {
        self.internal_flush = Some(InternalFlush::Wanted);
    }

    /// True if the flush has succeeded, false if it has failed, `None` until then.
    pub(in crate::engine) fn flushed(&mut self) -> Option<bool> {
        let Some(InternalFlush::Done(success)) = self.internal_flush else { return None };
        self.internal_flush = None;
        Some(success)
    }

    /// Fails a pending flush. Returns true if there was one.
    fn fail_internal_flush(&mut self) -> bool {
        let pending = matches!(self.internal_flush, Some(InternalFlush::Wanted | InternalFlush::Submitted));
        if pending {
            self.internal_flush = Some(InternalFlush::Done(false));
        }
        pending
    }

    /// Fails every available request, because there is no device. Returns true if a flush has failed as well, whose reply is now
    /// due.
    pub(in crate::engine) fn fail_all(&mut self) -> bool {
        for slot in 0..if self.held { 0 } else { self.slots.len() } {
            self.serve(None, slot);
        }
        self.fail_internal_flush()
    }

    /// Lets others see how many requests each ring has in flight.
    pub(in crate::engine) fn report_depths(&self) {
        for (slot, count) in self.slots.iter().zip(&self.counters.rings) {
            count.in_flight.set(slot.ring.as_ref().map_or(0, |ring| ring.in_flight.into()));
        }
    }

    /// Fails the requests in flight or starts them over, as `policy` says. The device has been reset, so it no longer accesses
    /// their memory.
    pub(in crate::engine) fn handle_reset(&mut self, policy: InflightPolicy) {
        self.partial = None;
        self.resubmit.clear();
        self.fail_internal_flush();
        self.bounce.give_back_all();
        for index in self.inflight.indices() {
            if let Some((inflight_request, _)) = self.inflight.get(index) {
                let sent = inflight_request.outstanding != 0;
                inflight_request.unsure |= sent && self.disk.is_in_order(inflight_request.operation);
                if inflight_request.restart(policy) {
                    self.resubmit.push(index);
                    self.counters.resubmitted.add(1);
                    continue;
                }
                inflight_request.outcome = Outcome::Failed;
            }
            self.finish_now(index);
        }
    }

    /// Leaves the requests of a ring to its record, without used entries. No device has their commands: it has been reset, and this
    /// worker has no queue yet.
    pub(in crate::engine) fn leave_recorded(&mut self, slot: usize) {
        for index in self.inflight.indices() {
            let of_ring = |request: &InflightRequest| request.ring == slot;
            if self.inflight.get(index).is_none_or(|(request, _)| !of_ring(request)) {
                continue;
            }
            let Some((left, _)) = self.inflight.remove(index) else { continue };
            left.pending_used.leave();
            if let Some(ring) = &mut self.slots[slot].ring {
                ring.in_flight -= 1;
                ring.left += 1;
            }
        }
    }

    /// Handles a completion, and the end of its request.
    #[inline(never)]
    fn complete(&mut self, completion: Completion) {
        let Completion { tag, outcome, .. } = completion;
        if tag == INTERNAL_FLUSH {
            self.internal_flush = Some(InternalFlush::Done(outcome == Outcome::Success));
            return;
        }
        let (index, piece) = if tag & BOUNCED == 0 {
            (tag, None)
        } else {
            match self.bounce.give_back(tag & !BOUNCED) {
                Some(piece) => (piece.inflight_request, Some(piece)),
                None => {
                    return self
                        .ring_fault_log
                        .error(|| "the device completed a bounced command that was not submitted".to_owned());
                }
            }
        };
        let Some((inflight_request, data)) =
            self.inflight.get(index).filter(|(inflight_request, _)| inflight_request.outstanding != 0)
        else {
            return self.ring_fault_log.error(|| "the device completed a command that was not submitted".to_owned());
        };
        if inflight_request.unsure || inflight_request.operation.is_on_zones() {
            return self.complete_on_zones(index, piece, completion);
        }
        if let Some(piece) = piece
            && inflight_request.operation == Operation::Read
            && outcome == Outcome::Success
        {
            self.caches.slot(&self.bounce, tag & !BOUNCED, piece.bytes);
            let slot = self.bounce.slot(tag & !BOUNCED, piece.bytes);
            self.guest.bounce(&data.buffers, piece.position, &slot, true);
        }
        inflight_request.complete_command(outcome);
        // `advance` finishes a partly submitted request.
        if self.partial == Some(index) {
            return;
        }
        if inflight_request.is_complete() {
            self.finish(index);
        } else if inflight_request.outstanding == 0 {
            self.resubmit.push(index);
        }
    }

    #[cold]
    fn log_fault(&mut self, slot: usize, fault: &RequestFault) {
        let virtqueue = self.virtqueue(slot);
        // The most likely cause is guest RAM that the front-end does not share.
        let hint = || match fault {
            RequestFault::Memory { .. } | RequestFault::Chain(ChainFault::IndirectMemory(_)) => format!(
                "; shared is {}: if the guest has RAM there, such as a DIMM or a NUMA node, give its memory backend share=on",
                self.guest.table()
            ),
            _ => String::new(),
        };
        self.request_fault_log.warn(|| format!("virtqueue {virtqueue}: request refused: {fault}{}", hint()));
    }

    #[cold]
    pub(in crate::engine) fn fail_ring(&mut self, slot: usize, reason: &dyn std::fmt::Display) {
        let virtqueue = self.virtqueue(slot);
        let line = || format!("virtqueue {virtqueue}: {reason}{LostPages}; it is not served until it is restarted");
        self.ring_fault_log.error(line);
        if let Some(ring) = &mut self.slots[slot].ring {
            ring.fail();
        }
    }

    /// Records the requests of a ring that has just been started in `region`, and finds those of the process before. The ring
    /// fails if the record cannot be believed.
    pub(in crate::engine) fn track(&mut self, slot: usize, region: &InflightRegion) {
        let virtqueue = self.virtqueue(slot);
        let Some(ring) = &mut self.slots[slot].ring else { return };
        let tracking = ring.queue.track(region);
        // The recovery may have moved a ring that started at its first position.
        ring.call_if_run();
        match tracking {
            Err(contradiction) => self.fail_ring(slot, &contradiction),
            Ok(Tracking::On { recovered: 0 }) => {}
            Ok(Tracking::On { recovered }) => self.ring_fault_log.warn(|| {
                format!("virtqueue {virtqueue}: {recovered} requests of the process before are submitted again")
            }),
            Ok(Tracking::Off) => self.ring_fault_log.warn(|| {
                format!(
                    "virtqueue {virtqueue}: its inflight region is new and the ring is not; a crash may lose its requests"
                )
            }),
        }
    }

    /// The index of the virtqueue in this slot.
    pub(in crate::engine) fn virtqueue(&self, slot: usize) -> usize {
        slot * self.workers + self.worker
    }
}
