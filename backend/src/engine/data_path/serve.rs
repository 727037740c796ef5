//! Takes requests from a ring. Each is completed at once or submitted, until the device queue is full.

use super::fast_run::RunEnd;
use super::inflight::InflightRequest;
use super::logging::Dirtied;
use super::{Capacity, DataPath, VringSlot};
use crate::driver::Queue;
use crate::engine::request::{Job, RequestFault, Status, parse};
use crate::engine::vring::State;

/// Requests that a pass takes from a ring at most. The driver sees the first used entries while the worker serves the rest. If a
/// pass took all, all requests would be on one side: the driver would wait for the worker, then the worker for the driver.
pub(in crate::engine) const BATCH: u16 = 16;

impl DataPath {
    /// Takes requests from one ring until it is empty, a batch has been taken, or the device queue is full.
    #[inline]
    pub(super) fn serve(&mut self, mut queue: Option<&mut dyn Queue>, slot: usize) -> Capacity {
        if self.slots[slot].ring.as_ref().is_some_and(|ring| ring.queue.has_recovered()) {
            // `Option::as_deref_mut` would borrow `queue` for longer than the call.
            let device = queue.as_mut().map(|queue| &mut **queue as &mut dyn Queue);
            if self.serve_recovered(device, slot) == Capacity::Exhausted {
                return Capacity::Exhausted;
            }
        }
        let mut left = self.offered(slot).min(BATCH);
        while left != 0 {
            if let Some(queue) = &mut queue {
                let run = self.serve_fast(*queue, slot, left);
                left -= run.taken;
                match run.end {
                    RunEnd::Complete => break,
                    RunEnd::Started(index) if self.advance(*queue, index) == Capacity::Exhausted => {
                        return Capacity::Exhausted;
                    }
                    RunEnd::Started(_) => continue,
                    RunEnd::Other => {}
                }
            }
            left -= 1;
            let Some(ring) = &mut self.slots[slot].ring else { break };
            match ring.queue.take(&mut self.guest, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(broken) => {
                    self.fail_ring(slot, &broken);
                    break;
                }
            }
            ring.in_flight += 1;
            // `Option::as_deref_mut` would borrow `queue` for longer than the call.
            let device = queue.as_mut().map(|queue| &mut **queue as &mut dyn Queue);
            if self.begin(device, slot, false) == Capacity::Exhausted {
                return Capacity::Exhausted;
            }
        }
        Capacity::Available
    }

    /// How many requests may be taken from a ring. Those in flight never exceed its size, even if the driver offers a chain again
    /// before it is returned.
    #[inline]
    fn offered(&mut self, slot: usize) -> u16 {
        let VringSlot { enabled: true, ring: Some(ring) } = &self.slots[slot] else { return 0 };
        if ring.state != State::Serving {
            return 0;
        }
        match ring.queue.available() {
            Ok(offered) => offered.min(ring.queue.size() - ring.in_flight),
            Err(broken) => {
                self.fail_ring(slot, &broken);
                0
            }
        }
    }

    /// Submits requests again that were in flight when the process before ended. A ring that stops waits for them.
    #[cold]
    fn serve_recovered(&mut self, mut queue: Option<&mut dyn Queue>, slot: usize) -> Capacity {
        loop {
            let VringSlot { enabled, ring: Some(ring) } = &mut self.slots[slot] else { return Capacity::Available };
            if !(*enabled && ring.state == State::Serving || ring.state == State::Draining)
                || !ring.queue.take_recovered(&mut self.guest, &mut self.chain)
            {
                return Capacity::Available;
            }
            ring.in_flight += 1;
            self.counters.resubmitted.add(1);
            let device = queue.as_mut().map(|queue| &mut **queue as &mut dyn Queue);
            if self.begin(device, slot, true) == Capacity::Exhausted {
                return Capacity::Exhausted;
            }
        }
    }

    /// Starts the request in `self.chain`, which the process before may have executed if it is `recovered`.
    #[inline]
    fn begin(&mut self, queue: Option<&mut dyn Queue>, slot: usize, recovered: bool) -> Capacity {
        let mut vacancy = self.inflight.vacant();
        let index = vacancy.index();
        let (pending_used, job) = parse(&self.chain, &mut self.guest, &self.disk, vacancy.data());
        match if recovered { repeatable(job) } else { job } {
            Job::Device { operation, block, bytes } => {
                let Some(queue) = queue else {
                    self.answer_now(pending_used, slot, Status::IoError, 0, None);
                    return Capacity::Available;
                };
                let unsure = recovered && self.disk.is_in_order(operation);
                let request = InflightRequest::new(pending_used, slot, (operation, block, bytes), self.clock.now);
                vacancy.occupy(InflightRequest { unsure, ..request });
                return self.advance(queue, index);
            }
            Job::Identify => {
                let written = self.guest.scatter(&vacancy.data().buffers, self.disk.id()) as u64;
                self.answer_now(pending_used, slot, Status::Ok, written, Some(Dirtied::data(index, written)));
            }
            Job::Answer(status) => self.answer_now(pending_used, slot, status, 0, None),
            Job::Refuse(fault) => {
                self.answer_now(pending_used, slot, Status::IoError, 0, None);
                self.log_fault(slot, &fault);
            }
        }
        Capacity::Available
    }
}

/// What is done with a request that the process before may have executed.
fn repeatable(job: Job) -> Job {
    match job {
        Job::Device { operation, .. } if !operation.is_repeatable() => Job::Refuse(RequestFault::MaybeAppended),
        job => job,
    }
}
