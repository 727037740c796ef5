//! Requests in flight. The table grows with the rings and never shrinks. A slot keeps its buffer list when it is reused, so
//! the data path does not allocate.

use crate::addr::{Gpa, Iova, Span};
use crate::driver::{Direction, Outcome};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::inflight_policy::InflightPolicy;
use crate::engine::request::pending_used::PendingUsed;
use crate::engine::request::{Data, Operation};
use crate::engine::virtqueue::chain::Head;

/// A request in flight.
pub(in crate::engine) struct InflightRequest {
    pub(in crate::engine) pending_used: PendingUsed,
    /// The slot of its ring in the worker.
    pub(in crate::engine) ring: usize,
    pub(in crate::engine) operation: Operation,
    /// First logical block.
    pub(in crate::engine) block: u64,
    /// Bytes of data; for a discard, the number of ranges.
    pub(in crate::engine) bytes: u64,
    /// How much of that submitted commands cover.
    pub(in crate::engine) position: u64,
    /// Where a restart begins. What precedes it has been executed, and would not be the same a second time.
    pub(in crate::engine) restart_at: u64,
    /// True if a command of a write to a zone may have been executed. The zone's write pointer tells.
    pub(in crate::engine) unsure: bool,
    /// True if there is nothing left to submit.
    pub(in crate::engine) fully_submitted: bool,
    /// Commands submitted and not yet completed.
    pub(in crate::engine) outstanding: u32,
    /// True if it has been submitted again after a reset that it may have caused.
    pub(in crate::engine) resubmitted: bool,
    /// The worst outcome so far.
    pub(in crate::engine) outcome: Outcome,
    /// When it was taken, by the worker's clock; 0 if that was not measured.
    pub(in crate::engine) started: u64,
}

impl InflightRequest {
    /// A request from `ring` without commands.
    #[inline]
    pub(in crate::engine) fn new(
        pending_used: PendingUsed,
        ring: usize,
        (operation, block, bytes): (Operation, u64, u64),
        started: u64,
    ) -> Self {
        Self {
            started,
            pending_used,
            ring,
            operation,
            block,
            bytes,
            position: 0,
            restart_at: 0,
            unsure: false,
            fully_submitted: false,
            resubmitted: false,
            outstanding: 0,
            outcome: Outcome::Success,
        }
    }

    /// True if every command has been submitted and has completed.
    #[inline]
    pub(in crate::engine) fn is_complete(&self) -> bool {
        self.fully_submitted && self.outstanding == 0
    }

    /// Starts the request over after a device reset, if `policy` says so. Returns false if not, if a command has failed, or if one
    /// may have been executed that must not be executed twice.
    pub(in crate::engine) fn restart(&mut self, policy: InflightPolicy) -> bool {
        let wanted = match policy {
            InflightPolicy::Resubmit => !std::mem::replace(&mut self.resubmitted, true),
            InflightPolicy::Continue => true,
            InflightPolicy::Fail => false,
        };
        let harmless = self.operation.is_repeatable() || self.outstanding == 0;
        if !wanted || !harmless || self.outcome != Outcome::Success {
            return false;
        }
        (self.position, self.fully_submitted, self.outstanding) = (self.restart_at, false, 0);
        true
    }

    /// Continues a write to a zone from `position`, up to which it has been executed.
    pub(in crate::engine) fn executed_up_to(&mut self, position: u64) {
        self.position = position.clamp(self.restart_at, self.bytes);
        self.fully_submitted = self.position == self.bytes;
    }

    /// True if the next command must wait for the one before.
    pub(in crate::engine) fn must_wait(&mut self, in_order: bool) -> bool {
        if !in_order {
            return false;
        }
        if self.outstanding == 0 {
            self.restart_at = self.position;
        }
        self.outstanding != 0
    }

    /// Records the outcome of a command. The worst one is the request's. After a failure the rest is not submitted.
    #[inline]
    pub(in crate::engine) fn complete_command(&mut self, outcome: Outcome) {
        self.outstanding -= 1;
        match (self.outcome, outcome) {
            (_, Outcome::Success) => return,
            (Outcome::Failed, _) => {}
            (_, worse) => self.outcome = worse,
        }
        self.fully_submitted = true;
    }

    /// Records a submitted command that covers `amount` more.
    #[inline]
    pub(in crate::engine) fn add_command(&mut self, amount: u64) {
        self.outstanding += 1;
        self.position += amount;
        self.fully_submitted = self.position >= self.bytes;
    }

    /// Bytes that no command covers yet, up to `limit`.
    #[inline]
    pub(in crate::engine) fn remaining(&self, limit: u32) -> u32 {
        u32::try_from(self.bytes - self.position).map_or(limit, |left| left.min(limit))
    }
}

/// A read or write of one buffer whose only command is in flight and covers all of it: what most requests are until they
/// complete. If anything else happens to it, it becomes an [`InflightRequest`].
pub(in crate::engine) struct ShortRequest {
    pub(in crate::engine) pending_used: PendingUsed,
    /// See [`InflightRequest::ring`].
    pub(in crate::engine) ring: usize,
    pub(in crate::engine) direction: Direction,
    /// First logical block.
    pub(in crate::engine) block: u64,
    /// Where the device has the data.
    pub(in crate::engine) data: Span<Iova>,
    /// See [`InflightRequest::started`].
    pub(in crate::engine) started: u64,
}

impl ShortRequest {
    /// The same as an [`InflightRequest`] without commands. Its buffers are put into `buffers`.
    fn expand(self, buffers: &mut Data) -> InflightRequest {
        let Self { pending_used, ring, direction, block, data, started } = self;
        buffers.clear();
        buffers.buffers.push(data);
        InflightRequest::new(pending_used, ring, (direction.into(), block, data.len()), started)
    }
}

/// What remains of a [`ShortRequest`] when the device has finished it.
#[derive(Clone, Copy)]
pub(in crate::engine) struct FinishedShort {
    pub(in crate::engine) head: Head,
    pub(in crate::engine) direction: Direction,
    pub(in crate::engine) bytes: u64,
}

/// What remains of a request when the device has finished it; see [`InflightRequest`].
pub(in crate::engine) struct Finished {
    pub(in crate::engine) pending_used: PendingUsed,
    pub(in crate::engine) ring: usize,
    pub(in crate::engine) operation: Operation,
    pub(in crate::engine) bytes: u64,
    pub(in crate::engine) outcome: Outcome,
    pub(in crate::engine) started: u64,
}

/// A slot for a request.
pub(in crate::engine) struct InflightSlot {
    pub(in crate::engine) data: Data,
    occupant: Occupant,
    /// While it is free, the next free one. [`NO_SLOT`] in the last one.
    next_free: u32,
}

/// What is in a slot.
#[derive(Default)]
enum Occupant {
    #[default]
    None,
    Short(ShortRequest),
    Any(InflightRequest),
}

/// No table has as many slots.
const NO_SLOT: u32 = u32::MAX;

impl InflightSlot {
    /// The request, expanded if it is a short one.
    #[inline]
    fn request(&mut self) -> Option<(&mut InflightRequest, &Data)> {
        if matches!(self.occupant, Occupant::Short(_)) {
            self.expand(true);
        }
        match &mut self.occupant {
            Occupant::Any(request) => Some((request, &self.data)),
            _ => None,
        }
    }

    /// Expands a short request, whose command is in flight if it has been `submitted`.
    #[cold]
    fn expand(&mut self, submitted: bool) {
        if let Occupant::Short(short) = std::mem::take(&mut self.occupant) {
            let mut request = short.expand(&mut self.data);
            if submitted {
                request.add_command(request.bytes);
            }
            self.occupant = Occupant::Any(request);
        }
    }

    /// True if the request accesses memory in `spans` of `guest`.
    fn uses(&self, guest: &GuestMemoryView, spans: &[Span<Gpa>]) -> bool {
        let (pending_used, buffers) = match &self.occupant {
            Occupant::None => return false,
            Occupant::Short(short) => (&short.pending_used, std::slice::from_ref(&short.data).iter().chain(&[])),
            Occupant::Any(request) => (&request.pending_used, self.data.buffers.iter().chain(&self.data.append_sector)),
        };
        let status = pending_used.status();
        let data = |span: &Span<Gpa>| buffers.clone().any(|buffer| guest.gpa(*buffer).overlaps(span));
        spans.iter().any(|span| status.is_some_and(|byte| span.contains(byte)) || data(span))
    }
}

/// A free slot, which stays free until [`Self::occupy`].
pub(in crate::engine) struct Vacancy<'t> {
    index: u32,
    slot: &'t mut InflightSlot,
    first_free: &'t mut u32,
}

impl Vacancy<'_> {
    /// The index of the slot.
    #[inline]
    pub(in crate::engine) fn index(&self) -> u32 {
        self.index
    }

    /// The data of the request that will occupy the slot.
    #[inline]
    pub(in crate::engine) fn data(&mut self) -> &mut Data {
        &mut self.slot.data
    }

    /// Puts a request into the slot. Always inlined, so that the request is built in its place.
    #[inline(always)]
    pub(in crate::engine) fn occupy(self, inflight_request: InflightRequest) {
        self.put(Occupant::Any(inflight_request));
    }

    /// The same for a short one.
    #[inline(always)]
    pub(in crate::engine) fn occupy_short(self, short: ShortRequest) {
        self.put(Occupant::Short(short));
    }

    #[inline(always)]
    fn put(self, occupant: Occupant) {
        let before = std::mem::replace(&mut self.slot.occupant, occupant);
        debug_assert!(matches!(before, Occupant::None), "a free slot");
        // A free slot has nothing to drop, which the compiler does not know.
        std::mem::forget(before);
        *self.first_free = self.slot.next_free;
    }
}

/// A worker's requests in flight.
pub(in crate::engine) struct InflightTable {
    slots: Vec<InflightSlot>,
    /// The slot that was freed last. [`NO_SLOT`] if none is free.
    first_free: u32,
}

impl Default for InflightTable {
    fn default() -> Self {
        Self { slots: Vec::new(), first_free: NO_SLOT }
    }
}

impl InflightTable {
    /// Adds `count` slots, so that the data path need not allocate.
    pub(in crate::engine) fn reserve(&mut self, count: u16) {
        for _ in 0..count {
            let next_free = self.first_free;
            self.first_free = u32::try_from(self.slots.len()).expect("rings are few and short");
            self.slots.push(InflightSlot { data: Data::default(), occupant: Occupant::None, next_free });
        }
    }

    /// A free slot.
    #[inline]
    pub(in crate::engine) fn vacant(&mut self) -> Vacancy<'_> {
        if self.first_free as usize >= self.slots.len() {
            self.reserve(1);
        }
        let Self { slots, first_free } = self;
        Vacancy { index: *first_free, slot: &mut slots[*first_free as usize], first_free }
    }

    /// The request and its data.
    #[inline]
    pub(in crate::engine) fn get(&mut self, index: u32) -> Option<(&mut InflightRequest, &Data)> {
        self.slots.get_mut(index as usize)?.request()
    }

    /// Removes a request. Its data stay until the slot is reused. Always inlined: the request would be copied otherwise.
    #[inline(always)]
    pub(in crate::engine) fn remove(&mut self, index: u32) -> Option<(Finished, &Data)> {
        let slot = self.slots.get_mut(index as usize)?;
        slot.request()?;
        let Occupant::Any(request) = std::mem::take(&mut slot.occupant) else { return None };
        slot.next_free = std::mem::replace(&mut self.first_free, index);
        let InflightRequest { pending_used, ring, operation, bytes, outcome, started, .. } = request;
        Some((Finished { pending_used, ring, operation, bytes, outcome, started }, &slot.data))
    }

    /// The command of the short request in a slot could not be submitted.
    #[cold]
    pub(in crate::engine) fn not_submitted(&mut self, index: u32) {
        self.slots[index as usize].expand(false);
    }

    /// The ring of a request, if it is a short one. See [`InflightRequest::ring`].
    #[inline]
    pub(in crate::engine) fn ring_of_short(&self, index: u32) -> Option<usize> {
        match self.slots.get(index as usize)?.occupant {
            Occupant::Short(ShortRequest { ring, .. }) => Some(ring),
            _ => None,
        }
    }

    /// Removes a request if it is a short one whose status has been `answered`, which gets its ring and the address of its status
    /// byte. The caller must push a used entry for it.
    #[inline(always)]
    pub(in crate::engine) fn remove_short(
        &mut self,
        index: u32,
        answered: impl FnOnce(usize, Gpa) -> bool,
    ) -> Option<FinishedShort> {
        let slot = self.slots.get_mut(index as usize)?;
        let Occupant::Short(ShortRequest { pending_used, ring, direction, data, .. }) = &slot.occupant else {
            return None;
        };
        if !answered(*ring, pending_used.status()?) {
            return None;
        }
        let finished = FinishedShort { head: pending_used.head(), direction: *direction, bytes: data.len() };
        slot.next_free = std::mem::replace(&mut self.first_free, index);
        // Nothing is moved out of its place to be dropped.
        std::mem::forget(std::mem::take(&mut slot.occupant));
        Some(finished)
    }

    /// The data in a slot, also of a request that has been removed and not followed by another.
    pub(in crate::engine) fn data(&self, index: u32) -> &Data {
        &self.slots[index as usize].data
    }

    /// True if a request in flight accesses memory in `spans` of `guest`.
    pub(in crate::engine) fn uses(&self, guest: &GuestMemoryView, spans: &[Span<Gpa>]) -> bool {
        self.slots.iter().any(|slot| slot.uses(guest, spans))
    }

    /// The indices of all requests in flight.
    pub(in crate::engine) fn indices(&self) -> Vec<u32> {
        let occupied = self.slots.iter().zip(0..).filter(|(slot, _)| !matches!(slot.occupant, Occupant::None));
        occupied.map(|(_, index)| index).collect()
    }
}

#[cfg(test)]
mod tests;
