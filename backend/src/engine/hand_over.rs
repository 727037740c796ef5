//! The engine's part of a hand-over to another process. Each step is a guard: dropped, it takes the step back, and the engine goes
//! on as if nothing had been.
//!
//! ```text
//!  hold: no request is taken, those taken are completed ──▶ (rings stop, keeping their bases) ──▶ quiesce: the device is stopped
//!    drop: requests are taken again                                                              drop: it is started again
//! ```

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use super::inflight_policy::InflightPolicy;
use super::recovery::SupervisedDevice;
use super::worker::WorkerCommand;
use super::{Engine, EngineError, WorkerHandle};

/// Requests wait in their rings.
#[must_use]
pub struct Held<'e>(&'e Engine);

/// The device is stopped and belongs to nobody. The watchdog waits.
#[must_use]
pub struct Quiesced<'e> {
    engine: &'e Engine,
    device: MutexGuard<'e, SupervisedDevice>,
}

impl Engine {
    /// Takes no more requests, and waits until those taken are complete. Rings can then be stopped at once.
    ///
    /// # Errors
    /// [`EngineError::Busy`] if they are not complete within `limit`, because the device is slow, is being reset or is away.
    /// Requests are taken again then.
    pub fn hold(&self, limit: Duration) -> Result<Held<'_>, EngineError> {
        let held = Held(self);
        let post = |handle: &WorkerHandle| handle.command_queue.post(WorkerCommand::Hold);
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        let deadline = Instant::now() + limit;
        for answer in &answers {
            let left = deadline.saturating_duration_since(Instant::now());
            answer.recv_timeout(left).map_err(|_| EngineError::Busy(limit))?;
        }
        Ok(held)
    }

    /// Stops the device, so that another process can start it. Every ring has been stopped.
    ///
    /// # Errors
    /// [`EngineError::Quiesce`]. The device has been started again, or its recovery goes on as after a failed reset.
    pub fn quiesce(&self) -> Result<Quiesced<'_>, EngineError> {
        let mut quiesced = Quiesced { engine: self, device: self.supervisor.lock() };
        self.supervisor.quiesce(&mut quiesced.device).map_err(EngineError::Quiesce)?;
        Ok(quiesced)
    }
}

impl Held<'_> {
    /// Leaves the requests to another process. Nothing may be asked of the engine any more.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.workers.iter().for_each(|handle| handle.command_queue.push(WorkerCommand::Release));
    }
}

impl Quiesced<'_> {
    /// Leaves the device to another process. Nothing may be asked of the engine any more.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        self.engine.supervisor.reset(&mut self.device, InflightPolicy::Resubmit);
    }
}
