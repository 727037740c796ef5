//! How the control thread waits for workers: for a reply, for requests to drain, and, when they do not drain, for the device
//! to come back from a reset.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use super::inflight_policy::InflightPolicy;
use super::worker::WorkerCommand;
use super::{Engine, EngineError};

impl Engine {
    /// Which worker serves a virtqueue, and its slot there.
    pub(super) fn slot(&self, index: usize) -> Result<(usize, usize), EngineError> {
        let rings = self.options.rings;
        if index >= rings {
            return Err(EngineError::NoSuchRing { index, rings });
        }
        Ok((index % self.workers.len(), index / self.workers.len()))
    }

    /// Sends a command and waits for the reply.
    pub(super) fn command<T>(
        &self,
        worker: usize,
        command: impl FnOnce(Sender<T>) -> WorkerCommand,
    ) -> Result<T, EngineError> {
        self.workers[worker].command_queue.post(command).recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// As [`Self::command`], for changes that cannot be refused.
    pub(super) fn change(&self, index: usize, command: impl FnOnce(usize, Sender<()>) -> WorkerCommand) {
        let done = self.slot(index).and_then(|(worker, slot)| self.command(worker, |answer| command(slot, answer)));
        if let Err(error) = done {
            log::error!("virtqueue {index}: {error}");
        }
    }

    /// When a drain that begins now must be over.
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
        let mut device = self.supervisor.lock();
        // The watchdog may have had the device until now.
        if let Ok(value) = answer.try_recv() {
            return Ok(value);
        }
        log::error!(
            "{occasion}: commands have not come back for {:?}; resetting the device, and failing every request in flight",
            self.options.patience
        );
        self.supervisor.reset(&mut device, InflightPolicy::Fail);
        drop(device);
        answer.recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// Runs `act` while the device has nothing in flight and gets nothing to do; requests wait meanwhile.
    ///
    /// # Errors
    /// [`EngineError::WorkerGone`]; then `act` has not run.
    pub fn while_idle<T>(&self, act: impl FnOnce() -> T) -> Result<T, EngineError> {
        let answers: Vec<_> =
            self.workers.iter().map(|handle| handle.command_queue.post(WorkerCommand::Rest)).collect();
        let deadline = self.deadline();
        let waits = answers.iter().enumerate();
        let rested =
            waits.map(|(worker, answer)| self.await_drained(worker, answer, deadline, "the device is to rest"));
        let rested = rested.collect::<Result<Vec<()>, _>>();
        // Under the lock, for the watchdog talks to the device too.
        let acted = rested.map(|_| {
            let _device = self.supervisor.lock();
            act()
        });
        self.workers.iter().for_each(|handle| handle.command_queue.leave(WorkerCommand::Go));
        acted
    }

    /// Stops every ring, ends every thread, and shuts the device down, in this order.
    fn close(&mut self) {
        for index in 0..self.options.rings {
            if let Err(error) = self.stop_ring(index) {
                log::error!("stop virtqueue {index}: {error}");
            }
        }
        self.watchdog = None;
        for handle in &mut self.workers {
            handle.command_queue.leave(WorkerCommand::Quit);
            if handle.thread.take().is_some_and(|thread| thread.join().is_err()) {
                log::error!("bug: a worker thread panicked");
            }
        }
        self.supervisor.lock().driver.shut_down();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
