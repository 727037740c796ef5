//! From a ring to requests: taken one by one, answered at once or started, as far as there is room.

use super::super::flights::{Flight, Place};
use super::super::request::{Job, Status, parse};
use super::super::ring::State;
use super::super::seat::Seat;
use super::{Path, Room};
use crate::driver::Queue;

impl Path {
    /// Takes what one ring offers, until there is no more of it or no more room.
    #[inline]
    pub(super) fn serve(&mut self, mut queue: Option<&mut dyn Queue>, seat: usize) -> Room {
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
            if let Some(queue) = &mut queue
                && let Some(room) = self.begin_usual(*queue, seat)
            {
                if room == Room::None {
                    return Room::None;
                }
                continue;
            }
            let Some(ring) = &mut self.seats[seat].ring else { break };
            match ring.queue.take(&mut self.guest, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(broken) => {
                    self.fail_ring(seat, &broken);
                    break;
                }
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

    /// Takes and starts the next request of a ring if it is the usual one.
    #[inline]
    fn begin_usual(&mut self, queue: &mut dyn Queue, seat: usize) -> Option<Room> {
        let ring = self.seats[seat].ring.as_mut()?;
        let usual = ring.queue.usual(&mut self.guest)?;
        let transfer = usual.transfer(&mut self.guest, &self.disk)?;
        ring.queue.take_usual(&usual);
        ring.in_flight += 1;
        let (index, Place { data, .. }) = self.flights.vacant();
        data.ranges.clear();
        data.buffers.clear();
        data.buffers.push(transfer.data);
        let what = (transfer.operation, transfer.block, transfer.data.len());
        self.flights.occupy(Flight::new(transfer.ticket(usual.head()), seat, what));
        Some(self.advance(queue, index))
    }

    /// Starts the request in `self.chain`.
    #[inline]
    fn begin(&mut self, queue: Option<&mut dyn Queue>, seat: usize) -> Room {
        let (index, place) = self.flights.vacant();
        let (ticket, job) = parse(&self.chain, &mut self.guest, &self.disk, &mut place.data);
        match job {
            Job::Device { operation, block, bytes } => {
                let Some(queue) = queue else {
                    self.answer(ticket, seat, Status::IoError, 0);
                    return Room::Left;
                };
                self.flights.occupy(Flight::new(ticket, seat, (operation, block, bytes)));
                return self.advance(queue, index);
            }
            Job::Identify => {
                let written = self.guest.scatter(&place.data.buffers, self.disk.id());
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
}
