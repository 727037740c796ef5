//! Requests in flight. The table grows with the rings and never shrinks. A slot keeps its buffer list when it is reused, so
//! the data path does not allocate.

use crate::addr::{Gpa, Span};
use crate::driver::Outcome;
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::pending_used::PendingUsed;
use crate::engine::request::{Data, Operation};

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
    /// True if there is nothing left to submit.
    pub(in crate::engine) fully_submitted: bool,
    /// Commands submitted and not yet completed.
    pub(in crate::engine) outstanding: u32,
    /// True if it has been submitted again after a reset.
    pub(in crate::engine) resubmitted: bool,
    /// The worst outcome so far.
    pub(in crate::engine) outcome: Outcome,
}

impl InflightRequest {
    /// A request from `ring` without commands.
    #[inline]
    pub(in crate::engine) fn new(
        pending_used: PendingUsed,
        ring: usize,
        (operation, block, bytes): (Operation, u64, u64),
    ) -> Self {
        Self {
            pending_used,
            ring,
            operation,
            block,
            bytes,
            position: 0,
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

    /// Starts the request over after a device reset. Returns false if that has been done before, or if a command has failed.
    pub(in crate::engine) fn restart(&mut self) -> bool {
        if self.outcome != Outcome::Success || std::mem::replace(&mut self.resubmitted, true) {
            return false;
        }
        (self.position, self.fully_submitted, self.outstanding) = (0, false, 0);
        true
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

/// A slot for a request.
#[derive(Default)]
pub(in crate::engine) struct InflightSlot {
    pub(in crate::engine) data: Data,
    /// `None` while the slot is free.
    pub(in crate::engine) inflight_request: Option<InflightRequest>,
}

/// A worker's requests in flight.
#[derive(Default)]
pub(in crate::engine) struct InflightTable {
    slots: Vec<InflightSlot>,
    free: Vec<u32>,
}

impl InflightTable {
    /// Adds `count` slots, so that the data path need not allocate.
    pub(in crate::engine) fn reserve(&mut self, count: u16) {
        for _ in 0..count {
            self.free.push(u32::try_from(self.slots.len()).expect("rings are few and short"));
            self.slots.push(InflightSlot::default());
        }
    }

    /// A free slot and its index. It stays free until [`Self::occupy`].
    #[inline]
    pub(in crate::engine) fn vacant(&mut self) -> (u32, &mut InflightSlot) {
        if self.free.is_empty() {
            self.reserve(1);
        }
        let index = *self.free.last().expect("reserved above");
        (index, &mut self.slots[index as usize])
    }

    /// Puts a request into the slot that [`Self::vacant`] returned last.
    #[inline]
    pub(in crate::engine) fn occupy(&mut self, inflight_request: InflightRequest) {
        let index = self.free.pop().expect("`vacant` has returned one");
        self.slots[index as usize].inflight_request = Some(inflight_request);
    }

    /// The request and its data.
    #[inline]
    pub(in crate::engine) fn get(&mut self, index: u32) -> Option<(&mut InflightRequest, &Data)> {
        let slot = self.slots.get_mut(index as usize)?;
        Some((slot.inflight_request.as_mut()?, &slot.data))
    }

    /// Removes a request. Its data stay until the slot is reused.
    #[inline]
    pub(in crate::engine) fn remove(&mut self, index: u32) -> Option<(InflightRequest, &Data)> {
        let slot = self.slots.get_mut(index as usize)?;
        let inflight_request = slot.inflight_request.take()?;
        self.free.push(index);
        Some((inflight_request, &slot.data))
    }

    /// True if a request in flight accesses memory in `spans` of `guest`.
    pub(in crate::engine) fn uses(&self, guest: &GuestMemoryView, spans: &[Span<Gpa>]) -> bool {
        let in_use = |slot: &InflightSlot| {
            let Some(inflight_request) = &slot.inflight_request else { return false };
            let status = inflight_request.pending_used.status();
            let data = |span: &Span<Gpa>| slot.data.buffers.iter().any(|buffer| guest.gpa(*buffer).overlaps(span));
            spans.iter().any(|span| status.is_some_and(|byte| span.contains(byte)) || data(span))
        };
        self.slots.iter().any(in_use)
    }

    /// The indices of all requests in flight.
    pub(in crate::engine) fn indices(&self) -> Vec<u32> {
        let occupied = self.slots.iter().zip(0..).filter(|(slot, _)| slot.inflight_request.is_some());
        occupied.map(|(_, index)| index).collect()
    }
}
