//! The load: keeps all rings full of the oracle's requests, and sleeps on the calls as a guest does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::client::{Error, Guest, Ring};
use crate::oracle::{Oracle, Tag, Wrong};

use super::background::Order;

/// Calls that take longer than this to follow their completion are missing.
const CALL_LIMIT: Duration = Duration::from_secs(2);

pub(super) struct Load<'a> {
    guest: &'a mut Guest,
    oracle: &'a mut Oracle,
    patience: Duration,
    first: Option<Instant>,
    /// Time of the last completion.
    last: Instant,
    /// Longest time between two completions.
    longest: Duration,
}

impl<'a> Load<'a> {
    pub(super) fn new(guest: &'a mut Guest, oracle: &'a mut Oracle, patience: Duration) -> Self {
        Self { guest, oracle, patience, first: None, last: Instant::now(), longest: Duration::ZERO }
    }

    pub(super) fn old_in_flight(&self) -> usize {
        self.oracle.old_in_flight()
    }

    /// When a request completed first.
    pub(super) fn first_completion(&self) -> Option<Instant> {
        self.first
    }

    /// Runs until all requests of the lives before have completed; false if the program dies first.
    pub(super) fn run_until_settled(&mut self) -> Result<bool, Error> {
        let start = Instant::now();
        while self.first.is_none() || self.oracle.old_in_flight() != 0 {
            if !self.step(true)? {
                return Ok(false);
            }
            // Others complete all the time, so the time without any says nothing about these.
            if self.oracle.old_in_flight() != 0 && start.elapsed() > self.patience {
                return Err(self.lost());
            }
        }
        Ok(true)
    }

    /// Runs until `stop` is set. An error if the program dies before.
    pub(super) fn run_until_stopped(
        &mut self,
        stop: &AtomicBool,
        completions: &AtomicU64,
        orders: &Receiver<Order>,
    ) -> Result<(), Error> {
        while !stop.load(Relaxed) {
            if let Ok(order) = orders.try_recv() {
                order(self.guest)?;
            }
            if !self.step(true)? {
                return Err("the server has disconnected".into());
            }
            completions.store(self.oracle.completions(), Relaxed);
        }
        Ok(())
    }

    /// The longest time between two completions.
    pub(super) fn longest_gap(&self) -> Duration {
        self.longest
    }

    /// Runs until the program dies.
    pub(super) fn run_until_alone(&mut self) -> Result<(), Error> {
        while self.step(true)? {}
        Ok(())
    }

    /// Waits for all requests in flight, then reads the whole disk.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        self.drain()?;
        self.oracle.start_scan();
        self.step(true)?;
        while self.guest.rings.iter().any(|ring| !ring.is_idle()) {
            self.step(true)?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Error> {
        while self.guest.rings.iter().any(|ring| !ring.is_idle()) {
            self.step(false)?;
        }
        Ok(())
    }

    /// Reaps, submits if wanted, and sleeps. False if the program is dead.
    fn step(&mut self, submit: bool) -> Result<bool, Error> {
        self.reap()?;
        if submit {
            self.submit();
        }
        // Nothing would wake it up.
        if self.guest.rings.iter().all(Ring::is_idle) {
            return Ok(!self.guest.is_alone());
        }
        let called = self.guest.sleep(CALL_LIMIT)?;
        if self.guest.is_alone() {
            return Ok(false);
        }
        if !called {
            // The call may follow just now. If it does not, the driver of a guest would wait forever.
            if self.reap()? != 0 && !self.guest.sleep(CALL_LIMIT)? {
                return Err(Wrong::NoCall.into());
            }
            if self.last.elapsed() > self.patience {
                return Err(self.lost());
            }
        }
        Ok(true)
    }

    /// Takes all completed requests from the rings and returns their number.
    pub(super) fn reap(&mut self) -> Result<usize, Error> {
        let mut count = 0;
        for (queue, ring) in (0_u16..).zip(&mut self.guest.rings) {
            // The call is for the entry after those that have been taken, so it is requested again after each of them.
            ring.expect_call();
            while let Some(done) = ring.try_reap() {
                let done = done.map_err(|slot| Wrong::Doubled(Tag { queue, slot }))?;
                let operation = self.oracle.in_flight(Tag { queue, slot: done.slot });
                let mut data = vec![0; operation.map_or(0, crate::oracle::Operation::bytes)];
                ring.data(done.slot, &mut data);
                self.oracle.completed(queue, done, &data)?;
                count += 1;
                ring.expect_call();
            }
        }
        if count != 0 {
            let now = Instant::now();
            if self.first.is_some() {
                self.longest = self.longest.max(now - self.last);
            }
            self.last = now;
            self.first.get_or_insert(self.last);
        }
        Ok(count)
    }

    fn submit(&mut self) {
        for (queue, ring) in (0_u16..).zip(&mut self.guest.rings) {
            if fill(queue, ring, self.oracle) {
                ring.publish();
            }
        }
    }

    /// The error for requests that do not complete.
    fn lost(&self) -> Error {
        let mut lost = self.oracle.lost();
        let count = lost.len();
        lost.truncate(4);
        let some: Vec<_> = lost.iter().map(ToString::to_string).collect();
        let old = self.oracle.old_in_flight();
        format!("{count} requests in flight, {old} of them from before a kill, do not complete: {}", some.join("; "))
            .into()
    }
}

fn fill(queue: u16, ring: &mut Ring, oracle: &mut Oracle) -> bool {
    let mut submitted = false;
    while ring.has_room() {
        let Some(operation) = oracle.plan(queue) else { break };
        let slot = ring.submit(operation.request());
        ring.set_data(slot, &operation.data());
        oracle.submitted(Tag { queue, slot }, operation);
        submitted = true;
    }
    submitted
}
