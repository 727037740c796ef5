//! Makes requests wait in their rings, so that the device can change hands. If it does not, the engine goes on as if nothing had
//! been: the guard is dropped.

use std::time::{Duration, Instant};

use super::worker::WorkerCommand;
use super::{Engine, EngineError, WorkerHandle};
use crate::sync::recv_until;

/// Requests wait in their rings until this is dropped.
#[must_use]
pub struct Held<'e>(&'e Engine);

impl Engine {
    /// Takes no more requests, and waits until those taken are complete. Rings can then be stopped at once.
    ///
    /// # Errors
    /// [`EngineError::Away`] at once if the device is down, so that requests go on to fail without delay. [`EngineError::Busy`]
    /// if they are not complete within `limit`, because the device is slow or is being reset. Requests are taken again then.
    pub fn hold(&self, limit: Duration) -> Result<Held<'_>, EngineError> {
        if self.supervisor.is_known_to_be_down() {
            return Err(EngineError::Away);
        }
        let held = Held(self);
        let post = |handle: &WorkerHandle| handle.command_queue.post(WorkerCommand::Hold);
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        let deadline = Instant::now() + limit;
        for answer in &answers {
            recv_until(answer, deadline).map_err(|_| EngineError::Busy(limit))?;
        }
        Ok(held)
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
