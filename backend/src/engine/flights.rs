//! Requests on their way through the device. The table grows with the rings and never shrinks; the buffer list of a place
//! stays with the place, so a warm table allocates nothing.

use super::request::{Data, Operation};
use super::ticket::Ticket;
use crate::addr::{Gpa, Span};
use crate::driver::Outcome;

/// One request that the device works on.
pub(super) struct Flight {
    pub(super) ticket: Ticket,
    /// Which of the worker's rings it came from.
    pub(super) ring: usize,
    pub(super) operation: Operation,
    /// First logical block.
    pub(super) block: u64,
    /// Bytes of data; for a discard, ranges.
    pub(super) bytes: u64,
    /// How much of that commands have been submitted for.
    pub(super) position: u64,
    /// True if there is nothing left to submit.
    pub(super) whole: bool,
    /// Commands submitted and not yet completed.
    pub(super) outstanding: u32,
    /// True if it has been submitted again after a reset.
    pub(super) again: bool,
    /// The worst so far.
    pub(super) outcome: Outcome,
}

impl Flight {
    /// A request from `ring` that no command has been submitted for.
    #[inline]
    pub(super) fn new(ticket: Ticket, ring: usize, (operation, block, bytes): (Operation, u64, u64)) -> Self {
        Self {
            ticket,
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
    pub(super) fn is_over(&self) -> bool {
        self.whole && self.outstanding == 0
    }

    /// Back to the beginning, for a device that has forgotten its commands; false if that has been done before, or a command
    /// has failed.
    pub(super) fn restart(&mut self) -> bool {
        if self.outcome != Outcome::Success || std::mem::replace(&mut self.again, true) {
            return false;
        }
        (self.position, self.whole, self.outstanding) = (0, false, 0);
        true
    }

    /// Notes how a command ended; the worst outcome is the request's. After a failure there is no use in submitting the
    /// rest.
    #[inline]
    pub(super) fn note(&mut self, outcome: Outcome) {
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
    pub(super) fn submitted(&mut self, amount: u64) {
        self.outstanding += 1;
        self.position += amount;
        self.whole = self.position >= self.bytes;
    }

    /// Bytes that no command covers yet, up to `limit`.
    #[inline]
    pub(super) fn left(&self, limit: u32) -> u32 {
        u32::try_from(self.bytes - self.position).map_or(limit, |left| left.min(limit))
    }
}

/// A place for a request.
#[derive(Default)]
pub(super) struct Place {
    pub(super) data: Data,
    /// `None` while the place is free.
    pub(super) flight: Option<Flight>,
}

/// All places.
#[derive(Default)]
pub(super) struct Flights {
    places: Vec<Place>,
    free: Vec<u32>,
}

impl Flights {
    /// Makes room for `count` more requests at once, so that the data path does not.
    pub(super) fn reserve(&mut self, count: u16) {
        for _ in 0..count {
            self.free.push(u32::try_from(self.places.len()).expect("rings are few and short"));
            self.places.push(Place::default());
        }
    }

    /// A free place, and its name. It stays free until [`Self::occupy`].
    #[inline]
    pub(super) fn vacant(&mut self) -> (u32, &mut Place) {
        if self.free.is_empty() {
            self.reserve(1);
        }
        let index = *self.free.last().expect("just made one");
        (index, &mut self.places[index as usize])
    }

    /// Puts a request into the place that [`Self::vacant`] gave last.
    #[inline]
    pub(super) fn occupy(&mut self, flight: Flight) {
        let index = self.free.pop().expect("`vacant` has shown one");
        self.places[index as usize].flight = Some(flight);
    }

    /// The request and what it is about.
    #[inline]
    pub(super) fn get(&mut self, index: u32) -> Option<(&mut Flight, &Data)> {
        let place = self.places.get_mut(index as usize)?;
        Some((place.flight.as_mut()?, &place.data))
    }

    /// Takes a request out; what it was about stays until the place is used again.
    #[inline]
    pub(super) fn remove(&mut self, index: u32) -> Option<(Flight, &Data)> {
        let place = self.places.get_mut(index as usize)?;
        let flight = place.flight.take()?;
        self.free.push(index);
        Some((flight, &place.data))
    }

    /// True if a request in flight uses memory in `spans`.
    pub(super) fn touch(&self, spans: &[Span<Gpa>]) -> bool {
        let in_use = |place: &Place| {
            let Some(flight) = &place.flight else { return false };
            let status = flight.ticket.status();
            let data = |span: &Span<Gpa>| place.data.buffers.iter().any(|buffer| buffer.identity_gpa().overlaps(span));
            spans.iter().any(|span| status.is_some_and(|byte| span.contains(byte)) || data(span))
        };
        self.places.iter().any(in_use)
    }

    /// The names of all requests in flight.
    pub(super) fn names(&self) -> Vec<u32> {
        let occupied = self.places.iter().zip(0..).filter(|(place, _)| place.flight.is_some());
        occupied.map(|(_, index)| index).collect()
    }
}
