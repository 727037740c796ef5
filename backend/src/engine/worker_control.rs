//! How the control thread waits for workers: for a reply, and for requests to drain. If they do not drain, it resets the
//! device.

use std::sync::PoisonError;
use std::time::Instant;

use super::worker::WorkerCommand;
use super::{Drive, Engine, EngineError};
use crate::rate_limited_log::SharedLog;
use crate::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use crate::sync::recv_until;

/// A front-end can cause these again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

impl Engine {
    /// The worker that serves a virtqueue, and the virtqueue's slot there.
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

    /// As [`Self::command`], for a change of a virtqueue that cannot fail.
    pub(super) fn change(&self, index: usize, command: impl FnOnce(usize, Sender<()>) -> WorkerCommand) {
        let done = self.slot(index).and_then(|(worker, slot)| self.command(worker, |answer| command(slot, answer)));
        if let Err(error) = done {
            LOG.error(|| format!("virtqueue {index}: {error}"));
        }
    }

    /// End of a drain that begins now.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.options.drain_timeout
    }

    /// Waits for a reply that comes when requests have drained. Resets the device at `deadline`, and fails the requests of this
    /// engine's disk.
    pub(super) fn await_drained<T>(
        &self,
        worker: usize,
        answer: &Receiver<T>,
        deadline: Instant,
        action: &str,
    ) -> Result<T, EngineError> {
        match recv_until(answer, deadline) {
            Ok(value) => return Ok(value),
            Err(RecvTimeoutError::Disconnected) => return Err(EngineError::WorkerGone(worker)),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let mut device = self.supervisor.lock();
        // The watchdog may have reset the device while this thread waited for the lock.
        if let Ok(value) = answer.try_recv() {
            return Ok(value);
        }
        LOG.error(|| format!(
            "{action}: commands have not completed within {:?}; resetting the device and failing the requests in flight",
            self.options.drain_timeout
        ));
        self.supervisor.reset(&mut device, Some(self.disk));
        drop(device);
        answer.recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// Pauses the workers of all disks until `act` has run, so that the device is idle. Requests wait in their rings.
    ///
    /// # Errors
    /// [`EngineError::WorkerGone`]. `act` has not run.
    pub fn while_idle<T>(&self, act: impl FnOnce() -> T) -> Result<T, EngineError> {
        // One at a time: the workers go on as soon as one user of the idle device is done.
        let _one = self.drive.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let command_queues = self.supervisor.command_queues();
        let answers: Vec<_> =
            command_queues.iter().map(|command_queue| command_queue.post(WorkerCommand::Pause)).collect();
        let deadline = self.deadline();
        let waits = answers.iter().enumerate();
        let paused = waits.map(|(worker, answer)| self.await_drained(worker, answer, deadline, "pause the device"));
        let paused = paused.collect::<Result<Vec<()>, _>>();
        // The watchdog sends commands to the device too; the lock excludes it.
        let acted = paused.map(|_| {
            let _device = self.supervisor.lock();
            act()
        });
        command_queues.iter().for_each(|command_queue| command_queue.push(WorkerCommand::Resume));
        acted
    }

    /// Stops every ring and joins every worker. The last engine of the device then drops its [`Drive`].
    fn close(&mut self) {
        for index in 0..self.options.rings {
            if let Err(error) = self.stop_ring(index) {
                LOG.error(|| format!("stop virtqueue {index}: {error}"));
            }
        }
        self.supervisor.retire(self.disk);
        for handle in &mut self.workers {
            handle.command_queue.push(WorkerCommand::Quit);
            if handle.thread.take().is_some_and(|thread| thread.join().is_err()) {
                log::error!("bug: a worker thread panicked");
            }
        }
    }
}

impl Drop for Drive {
    /// Joins the watchdog and shuts the device down, in this order. No worker has a queue any more.
    fn drop(&mut self) {
        drop(self.watchdog.take());
        self.supervisor.shut_down();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}
