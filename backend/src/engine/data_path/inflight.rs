//! Requests on their way through the device. The table grows with the rings and never shrinks; the buffer list of a place
//! stays with the place, so a warm table allocates nothing.

use crate::addr::{Gpa, Span};
use crate::driver::Outcome;
use crate::engine::request::pending_used::PendingUsed;
use crate::engine::request::{Data, Operation};

/// One request that the device works on.
pub(in crate::engine) struct InflightRequest {
    pub(in crate::engine) pending_used: PendingUsed,
    /// Which of the worker's rings it came from.
    pub(in crate::engine) ring: usize,
    pub(in crate::engine) operation: Operation,
    /// First logical block.
    pub(in crate::engine) block: u64,
    /// Bytes of data; for a discard, ranges.
    pub(in crate::engine) bytes: u64,
    /// How much of that commands have been submitted for.
    pub(in crate::engine) position: u64,
    /// True if there is nothing left to submit.
    pub(in crate::engine) whole: bool,
    /// Commands submitted and not yet completed.
    pub(in crate::engine) outstanding: u32,
    /// True if it has been submitted again after a reset.
    pub(in crate::engine) again: bool,
    /// The worst so far.
    pub(in crate::engine) outcome: Outcome,
}

impl InflightRequest {
    /// A request from `ring` that no command has been submitted for.
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
            whole: false,
            again: false,
            outstanding: 0,
            outcome: Outcome::Success,
        }
    }

    /// True if no command of it is left, neither in the device nor to be submitted.
    #[inline]
    pub(in crate::engine) fn is_over(&self) -> bool {
        self.whole && self.outstanding == 0
    }

    /// Back to the beginning, for a device that has forgotten its commands; false if that has been done before, or a command
    /// has failed.
    pub(in crate::engine) fn restart(&mut self) -> bool {
        if self.outcome != Outcome::Success || std::mem::replace(&mut self.again, true) {
            return false;
        }
        (self.position, self.whole, self.outstanding) = (0, false, 0);
        true
    }

    /// Notes how a command ended; the worst outcome is the request's. After a failure there is no use in submitting the
    /// rest.
    #[inline]
    pub(in crate::engine) fn note(&mut self, outcome: Outcome) {
        self.outstanding -= 1;
        match (self.outcome, outcome) {
            (_, Outcome::Success) => return,
            (Outcome::Failed, _) => {}
            (_, worse) => self.outcome = worse,
        }
        self.whole = true;
    }

    /// Notes that so much more is covered by a command.
    #[inline]
    pub(in crate::engine) fn submitted(&mut self, amount: u64) {
        self.outstanding += 1;
        self.position += amount;
        self.whole = self.position >= self.bytes;
    }

    /// Bytes that no command covers yet, up to `limit`.
    #[inline]
    pub(in crate::engine) fn left(&self, limit: u32) -> u32 {
        u32::try_from(self.bytes - self.position).map_or(limit, |left| left.min(limit))
    }
}

/// A place for a request.
#[derive(Default)]
pub(in crate::engine) struct Place {
    pub(in crate::engine) data: Data,
    /// `None` while the place is free.
    pub(in crate::engine) inflight_request: Option<InflightRequest>,
}

/// All places.
#[derive(Default)]
pub(in crate::engine) struct InflightTable {
    places: Vec<Place>,
    free: Vec<u32>,
}

impl InflightTable {
    /// Makes room for `count` more requests at once, so that the data path does not.
    pub(in crate::engine) fn reserve(&mut self, count: u16) {
        for _ in 0..count {
            self.free.push(u32::try_from(self.places.len()).expect("rings are few and short"));
            self.places.push(Place::default());
        }
    }

    /// A free place, and its name. It stays free until [`Self::occupy`].
    #[inline]
    pub(in crate::engine) fn vacant(&mut self) -> (u32, &mut Place) {
        if self.free.is_empty() {
            self.reserve(1);
        }
        let index = *self.free.last().expect("just made one");
        (index, &mut self.places[index as usize])
    }

    /// Puts a request into the place that [`Self::vacant`] gave last.
    #[inline]
    pub(in crate::engine) fn occupy(&mut self, inflight_request: InflightRequest) {
        let index = self.free.pop().expect("`vacant` has shown one");
        self.places[index as usize].inflight_request = Some(inflight_request);
    }

    /// The request and what it is about.
    #[inline]
    pub(in crate::engine) fn get(&mut self, index: u32) -> Option<(&mut InflightRequest, &Data)> {
        let place = self.places.get_mut(index as usize)?;
        Some((place.inflight_request.as_mut()?, &place.data))
    }

    /// Takes a request out; what it was about stays until the place is used again.
    #[inline]
    pub(in crate::engine) fn remove(&mut self, index: u32) -> Option<(InflightRequest, &Data)> {
        let place = self.places.get_mut(index as usize)?;
        let inflight_request = place.inflight_request.take()?;
        self.free.push(index);
        Some((inflight_request, &place.data))
    }

    /// True if a request in flight uses memory in `spans`.
    pub(in crate::engine) fn touch(&self, spans: &[Span<Gpa>]) -> bool {
        let in_use = |place: &Place| {
            let Some(inflight_request) = &place.inflight_request else { return false };
            let status = inflight_request.pending_used.status();
            let data = |span: &Span<Gpa>| place.data.buffers.iter().any(|buffer| buffer.identity_gpa().overlaps(span));
            spans.iter().any(|span| status.is_some_and(|byte| span.contains(byte)) || data(span))
        };
        self.places.iter().any(in_use)
    }

    /// The names of all requests in flight.
    pub(in crate::engine) fn names(&self) -> Vec<u32> {
        let occupied = self.places.iter().zip(0..).filter(|(place, _)| place.inflight_request.is_some());
        occupied.map(|(_, index)| index).collect()
    }
}
