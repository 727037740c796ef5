//! The control thread's waiting: for an order's answer, for requests to drain, and, when they do not, for the device to
//! come back from a reset.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use super::keeper::Orphans;
use super::mailbox::Order;
use super::{Engine, EngineError};

impl Engine {
    /// Which worker serves a virtqueue, and its place there.
    pub(super) fn seat(&self, index: usize) -> Result<(usize, usize), EngineError> {
        let rings = self.options.rings;
        if index >= rings {
            return Err(EngineError::NoSuchRing { index, rings });
        }
        Ok((index % self.workers.len(), index / self.workers.len()))
    }

    /// Gives an order and waits for its answer.
    pub(super) fn order<T>(&self, worker: usize, order: impl FnOnce(Sender<T>) -> Order) -> Result<T, EngineError> {
        self.workers[worker].mailbox.post(order).recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// As [`Self::order`], for changes that cannot be refused.
    pub(super) fn change(&self, index: usize, order: impl FnOnce(usize, Sender<()>) -> Order) {
        let done = self.seat(index).and_then(|(worker, seat)| self.order(worker, |answer| order(seat, answer)));
        if let Err(error) = done {
            log::error!("virtqueue {index}: {error}");
        }
    }

    /// When the patience that begins now ends.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.options.patience
    }

    /// Waits until requests have drained; resets the device if they have not by `deadline`.
    pub(super) fn await_drained<T>(
        &self,
        worker: usize,
        answer: &Receiver<T>,
        deadline: Instant,
        occasion: &str,
    ) -> Result<T, EngineError> {
        match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(value) => return Ok(value),
            Err(RecvTimeoutError::Disconnected) => return Err(EngineError::WorkerGone(worker)),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let mut kept = self.keeper.lock();
        // The guard may have had the device until now.
        if let Ok(value) = answer.try_recv() {
            return Ok(value);
        }
        log::error!(
            "{occasion}: commands have not come back for {:?}; resetting the device, and failing every request in flight",
            self.options.patience
        );
        self.keeper.reset(&mut kept, Orphans::Fail);
        drop(kept);
        answer.recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// Runs `act` while the device has nothing in flight and gets nothing to do; requests wait meanwhile.
    ///
    /// # Errors
    /// [`EngineError::WorkerGone`]; then `act` has not run.
    pub fn at_rest<T>(&self, act: impl FnOnce() -> T) -> Result<T, EngineError> {
        let answers: Vec<_> = self.workers.iter().map(|handle| handle.mailbox.post(Order::Rest)).collect();
        let deadline = self.deadline();
        let waits = answers.iter().enumerate();
        let rested =
            waits.map(|(worker, answer)| self.await_drained(worker, answer, deadline, "the device is to rest"));
        let rested = rested.collect::<Result<Vec<()>, _>>();
        // Under the lock, for the guard talks to the device too.
        let acted = rested.map(|_| {
            let _kept = self.keeper.lock();
            act()
        });
        self.workers.iter().for_each(|handle| handle.mailbox.leave(Order::Go));
        acted
    }

    /// Stops every ring, ends every thread, and shuts the device down, in this order.
    fn close(&mut self) {
        for index in 0..self.options.rings {
            if let Err(error) = self.stop_ring(index) {
                log::error!("stop virtqueue {index}: {error}");
            }
        }
        self.guard = None;
        for handle in &mut self.workers {
            handle.mailbox.leave(Order::Quit);
            if handle.thread.take().is_some_and(|thread| thread.join().is_err()) {
                log::error!("a worker ended by a bug");
            }
        }
        self.keeper.lock().driver.shut_down();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
