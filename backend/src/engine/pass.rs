//! One worker's data path without its thread: what happens in a pass over the device and the rings. A pass never waits;
//! what cannot go on now (device queue full, no bounce slot) is kept half-submitted and goes on after completions.
//!
//! ```text
//!  available -> take -> parse -+-> answer at once ----------------------------+
//!                              +-> Flight -> submit .. ring -> (device) -> reap -> used ring -> call
//! ```
//! At most one request is half-submitted: behind it nothing is taken, so order of service stays fair and nothing starves.

use std::sync::Arc;
use std::time::Instant;

use super::bounce::{Bounce, Piece, SLOT_BYTES};
use super::caches::Caches;
use super::chain::Chain;
use super::flights::{Flight, Flights};
use super::guest::Guest;
use super::request::{Disk, Job, Operation, RequestFault, Status, Ticket, parse};
use super::ring::{Ring, State};
use super::statistics::Counters;
use crate::driver::{Completion, Outcome, Queue};
use crate::log_limit::LogLimit;

/// Set in the tag of a command that goes through a bounce slot; the rest is the slot, else the request.
const BOUNCED: u32 = 1 << 31;

/// A virtqueue's place with its worker.
#[derive(Default)]
pub(super) struct Seat {
    /// SET_VRING_ENABLE; outlives the ring.
    pub(super) enabled: bool,
    pub(super) ring: Option<Ring>,
}

/// Everything of a worker but its thread and its device queue.
pub(super) struct Path {
    pub(super) seats: Vec<Seat>,
    pub(super) guest: Guest,
    pub(super) flights: Flights,
    pub(super) counters: Arc<Counters>,
    bounce: Bounce,
    caches: Caches,
    disk: Disk,
    chain: Chain,
    limit: LogLimit,
    /// The request whose rest waits for room.
    half: Option<u32>,
    /// Where the next pass starts, so that a full device does not always favour the same ring.
    turn: usize,
    /// Names the rings in the log: virtqueue = seat × workers + worker.
    worker: usize,
    workers: usize,
}

/// Which worker of how many, with how many rings.
pub(super) struct Post {
    pub(super) worker: usize,
    pub(super) workers: usize,
    pub(super) seats: usize,
}

/// How far a submission came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Left,
    None,
}

impl Path {
    pub(super) fn new(post: &Post, disk: Disk, bounce: Bounce, caches: Caches, counters: Arc<Counters>) -> Self {
        Self {
            seats: (0..post.seats).map(|_| Seat::default()).collect(),
            guest: Guest::default(),
            flights: Flights::default(),
            counters,
            bounce,
            caches,
            disk,
            chain: Chain::default(),
            limit: LogLimit::default(),
            half: None,
            turn: 0,
            worker: post.worker,
            workers: post.workers,
        }
    }

    /// The rings that new requests are taken from.
    pub(super) fn served(&self) -> impl Iterator<Item = &Ring> {
        let enabled = self.seats.iter().filter(|seat| seat.enabled);
        enabled.filter_map(|seat| seat.ring.as_ref()).filter(|ring| ring.state == State::Serving)
    }

    /// Takes all completions; true if there were any.
    #[inline]
    pub(super) fn reap(&mut self, queue: &mut dyn Queue) -> bool {
        let mut any = false;
        queue.reap(&mut |completion| {
            any = true;
            self.complete(completion);
        });
        any
    }

    /// Takes every available request and submits it, as far as there is room. True if the device has something new.
    #[inline]
    pub(super) fn submit(&mut self, queue: &mut dyn Queue) -> bool {
        let before = queue.in_flight();
        if let Some(index) = self.half.take()
            && self.advance(queue, index) == Room::None
        {
            return queue.in_flight() != before;
        }
        let seats = self.seats.len();
        for n in 0..seats {
            let seat = (self.turn + n) % seats;
            if self.serve(Some(&mut *queue), seat) == Room::None {
                self.turn = (seat + 1) % seats;
                break;
            }
        }
        queue.in_flight() != before
    }

    /// Takes every available request and fails it: there is no device.
    pub(super) fn refuse(&mut self) {
        for seat in 0..self.seats.len() {
            self.serve(None, seat);
        }
    }

    /// Publishes the used entries of every ring that has any; true if there were some.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let mut any = false;
        for seat in &mut self.seats {
            if let Some(ring) = &mut seat.ring
                && ring.queue.has_unpublished()
            {
                ring.publish(&self.counters);
                any = true;
            }
        }
        any
    }

    /// Fails every request in flight. The device has been reset, so it touches their memory no more.
    pub(super) fn abandon(&mut self) {
        self.half = None;
        self.bounce.give_back_all();
        for index in self.flights.names() {
            if let Some((flight, _)) = self.flights.get(index) {
                flight.outcome = Outcome::Failed;
            }
            self.finish(index);
        }
    }

    /// Takes what one ring offers, until there is no more of it or no more room.
    #[inline]
    fn serve(&mut self, mut queue: Option<&mut dyn Queue>, seat: usize) -> Room {
        let Seat { enabled: true, ring: Some(ring) } = &mut self.seats[seat] else { return Room::Left };
        if ring.state != State::Serving {
            return Room::Left;
        }
        let offered = match ring.queue.available() {
            Ok(offered) => offered,
            Err(broken) => {
                self.fail_ring(seat, &broken);
                return Room::Left;
            }
        };
        // A driver that offers a chain again before it has come back could otherwise have more in flight than the ring holds.
        let count = offered.min(ring.queue.size() - ring.in_flight);
        for _ in 0..count {
            let Some(ring) = &mut self.seats[seat].ring else { break };
            if let Err(broken) = ring.queue.take(&mut self.guest, &mut self.chain) {
                self.fail_ring(seat, &broken);
                break;
            }
            ring.in_flight += 1;
            // Not `Option::as_deref_mut`: the reborrow must be as short as the call.
            let device = queue.as_mut().map(|queue| &mut **queue as &mut dyn Queue);
            if self.begin(device, seat) == Room::None {
                return Room::None;
            }
        }
        Room::Left
    }

    /// Starts the request in `self.chain`.
    #[inline]
    fn begin(&mut self, queue: Option<&mut dyn Queue>, seat: usize) -> Room {
        let (index, place) = self.flights.vacant();
        let (ticket, job) = parse(&self.chain, &mut self.guest, &self.disk, &mut place.buffers);
        match job {
            Job::Device { operation, block, bytes } => {
                let Some(queue) = queue else {
                    self.answer(ticket, seat, Status::IoError, 0);
                    return Room::Left;
                };
                self.flights.occupy(Flight {
                    ticket,
                    ring: seat,
                    operation,
                    block,
                    bytes,
                    position: 0,
                    whole: false,
                    outstanding: 0,
                    outcome: Outcome::Success,
                });
                return self.advance(queue, index);
            }
            Job::Identify => {
                let written = self.guest.scatter(&place.buffers, self.disk.id());
                self.answer(ticket, seat, Status::Ok, written as u64);
            }
            Job::Answer(status) => self.answer(ticket, seat, status, 0),
            Job::Refuse(fault) => {
                self.answer(ticket, seat, Status::IoError, 0);
                self.log_fault(seat, &fault);
            }
        }
        Room::Left
    }

    /// Submits what is left of a request.
    #[inline]
    fn advance(&mut self, queue: &mut dyn Queue, index: u32) -> Room {
        let Some((flight, buffers)) = self.flights.get(index) else { return Room::Left };
        while !flight.whole {
            let (bytes, direct) = match flight.operation {
                Operation::Flush => (0, true),
                operation if self.caches.keep_apart(operation, buffers) => (flight.left(SLOT_BYTES), false),
                _ => {
                    let extent = queue.extent(buffers, flight.position, SLOT_BYTES);
                    (extent.bytes, extent.direct)
                }
            };
            let command = flight.command(bytes, self.disk.block_shift());
            let submitted = if direct {
                let done = queue.submit(command, buffers, flight.position, bytes, index).is_ok();
                if done {
                    self.caches.buffers(&self.guest, buffers, flight.position, bytes.into());
                }
                done
            } else {
                let Some(slot) = self.bounce.take(Piece { flight: index, position: flight.position, bytes }) else {
                    self.half = Some(index);
                    return Room::None;
                };
                if flight.operation == Operation::Write {
                    self.guest.bounce(buffers, flight.position, &self.bounce.slot(slot, bytes), false);
                }
                let done = queue.submit(command, &[self.bounce.span(slot)], 0, bytes, BOUNCED | slot).is_ok();
                if done {
                    self.caches.slot(&self.bounce, slot, bytes);
                    self.counters.bounced.add(1);
                } else {
                    self.bounce.give_back(slot);
                }
                done
            };
            if !submitted {
                self.half = Some(index);
                return Room::None;
            }
            flight.submitted(bytes);
        }
        if flight.is_over() {
            self.finish(index);
        }
        Room::Left
    }

    /// Takes note of a finished command, and of the end of its request.
    #[inline]
    fn complete(&mut self, completion: Completion) {
        let Completion { tag, outcome } = completion;
        let (index, piece) = if tag & BOUNCED == 0 {
            (tag, None)
        } else {
            match self.bounce.give_back(tag & !BOUNCED) {
                Some(piece) => (piece.flight, Some(piece)),
                None => return log::error!("the device completed a bounced command that was not submitted"),
            }
        };
        let Some((flight, buffers)) = self.flights.get(index).filter(|(flight, _)| flight.outstanding != 0) else {
            return log::error!("the device completed a command that was not submitted");
        };
        if let Some(piece) = piece
            && flight.operation == Operation::Read
            && outcome == Outcome::Success
        {
            self.caches.slot(&self.bounce, tag & !BOUNCED, piece.bytes);
            let slot = self.bounce.slot(tag & !BOUNCED, piece.bytes);
            self.guest.bounce(buffers, piece.position, &slot, true);
        }
        flight.note(outcome);
        // A half-submitted request is finished where it is resumed.
        if flight.is_over() && self.half != Some(index) {
            self.finish(index);
        }
    }

    /// Answers a request that the device is done with.
    #[inline]
    fn finish(&mut self, index: u32) {
        if let Some((flight, buffers)) = self.flights.get(index)
            && flight.operation == Operation::Read
        {
            self.caches.buffers(&self.guest, buffers, 0, flight.bytes);
        }
        let Some(flight) = self.flights.remove(index) else { return };
        let success = flight.outcome == Outcome::Success;
        let moved = if success { flight.bytes } else { 0 };
        let counters = &self.counters;
        let (status, written) = match flight.operation {
            Operation::Read => {
                counters.reads.add(1);
                counters.bytes_read.add(moved);
                (flight.outcome, moved)
            }
            Operation::Write => {
                counters.writes.add(1);
                counters.bytes_written.add(moved);
                (flight.outcome, 0)
            }
            Operation::Flush => {
                counters.flushes.add(1);
                (flight.outcome, 0)
            }
        };
        let status = match status {
            Outcome::Success => Status::Ok,
            Outcome::Unsupported => Status::Unsupported,
            Outcome::Failed => Status::IoError,
        };
        self.answer(flight.ticket, flight.ring, status, written);
    }

    /// Writes the status and then the used entry; `written` bytes of data went into the chain before.
    #[inline]
    fn answer(&mut self, ticket: Ticket, seat: usize, status: Status, written: u64) {
        if status != Status::Ok {
            self.counters.errors.add(1);
        }
        let len = match ticket.status() {
            Some(byte) => {
                self.guest.write_status(byte, status as u8);
                u32::try_from(written + 1).unwrap_or(u32::MAX)
            }
            None => 0,
        };
        let head = ticket.settle();
        if let Some(ring) = &mut self.seats[seat].ring {
            ring.queue.push_used(head, len);
            ring.in_flight -= 1;
        }
    }

    #[cold]
    fn log_fault(&mut self, seat: usize, fault: &RequestFault) {
        let virtqueue = self.virtqueue(seat);
        if let Some(suppressed) = self.limit.admit(Instant::now()) {
            log::warn!("virtqueue {virtqueue}: request refused: {fault} ({suppressed} such lines left out before)");
        }
    }

    #[cold]
    pub(super) fn fail_ring(&mut self, seat: usize, why: &dyn std::fmt::Display) {
        log::error!("virtqueue {}: {why}; it is not served until it is restarted", self.virtqueue(seat));
        if let Some(ring) = &mut self.seats[seat].ring {
            ring.fail();
        }
    }

    /// The virtqueue that has this seat.
    pub(super) fn virtqueue(&self, seat: usize) -> usize {
        seat * self.workers + self.worker
    }
}
