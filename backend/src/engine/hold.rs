//! Makes requests wait in their rings, so that the device can change hands, or because an operator asks for it. If the device does
//! not change hands, the engine goes on as if nothing had been: the guard is dropped.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::worker::{CommandQueue, WorkerCommand};
use super::{Engine, EngineError};
use crate::sync::{Mutex, recv_until};

/// How many guards there are. Requests are taken again when the last one is dropped.
#[derive(Clone, Default)]
pub(super) struct Holds(Arc<Mutex<usize>>);

/// Requests wait in their rings until this is dropped.
#[must_use]
pub struct Held {
    holds: Holds,
    command_queues: Vec<Arc<CommandQueue>>,
}

impl Holds {
    /// Has all workers take no more requests, and waits until those taken are complete.
    ///
    /// # Errors
    /// [`EngineError::Busy`] if they are not complete within `limit`.
    pub(super) fn hold(&self, command_queues: Vec<Arc<CommandQueue>>, limit: Duration) -> Result<Held, EngineError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let held = Held { holds: self.clone(), command_queues };
        let answers: Vec<_> = held.command_queues.iter().map(|queue| queue.post(WorkerCommand::Hold)).collect();
        let deadline = Instant::now() + limit;
        for answer in &answers {
            recv_until(answer, deadline).map_err(|_| EngineError::Busy(limit))?;
        }
        Ok(held)
    }
}

impl Engine {
    /// Takes no more requests, and waits until those taken are complete. Rings can then be stopped at once.
    ///
    /// # Errors
    /// [`EngineError::Away`] at once if the device is down, so that requests go on to fail without delay. [`EngineError::Busy`]
    /// if they are not complete within `limit`, because the device is slow or is being reset. Requests are taken again then.
    pub fn hold(&self, limit: Duration) -> Result<Held, EngineError> {
        self.handle().hold(limit)
    }
}

impl Held {
    /// Leaves the requests to another process. Nothing may be asked of the engine any more.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut holds = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        *holds -= 1;
        // With the lock, so that a worker gets the hold of a later guard after this.
        if *holds == 0 {
            self.command_queues.iter().for_each(|queue| queue.push(WorkerCommand::Release));
        }
    }
}
