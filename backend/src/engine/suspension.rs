//! Stops a ring without waiting for a slow drive (vhost-user: GET_VRING_BASE_SKIP_DRAIN). Requests that are in flight get no used
//! entry. They stay in the ring's record, and whoever serves the ring next submits them again, as after a crash.
//!
//! ```text
//!  Suspend ──▶ Draining ── the last request completes ────────────────▶ stopped, nothing left
//!                 └─────── time is over ──▶ the device is reset ──────▶ stopped, requests left in the record
//!                                           └─▶ other rings: submitted again
//! ```
//! A command cannot be recalled: an Abort may have no effect (NVMe 2.0 §5.1), and its completion may come late. After a reset the
//! controller has no command, so nothing of the ring can access guest memory any more.

use std::time::{Duration, Instant};

use super::worker::WorkerCommand;
use super::{Engine, EngineError};
use crate::rate_limited_log::SharedLog;
use crate::sync::mpsc::{Receiver, RecvTimeoutError};
use crate::sync::recv_until;

/// A front-end can cause these again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// A ring that has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The position for [`super::VringSetup::base`].
    pub base: u32,
    /// Requests that are left in the ring's record.
    pub left: u16,
}

/// A worker's reply to a suspension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspension {
    /// Requests are in flight. Another reply follows.
    Waiting,
    Stopped(Stopped),
    /// The ring is not started.
    NotStarted,
    /// The ring has no record, so nothing has been done.
    NotRecorded,
}

impl Engine {
    /// Stops a ring, and returns its position. If its requests in flight do not complete within `limit`, the device is reset
    /// and they are left in the ring's record ([`super::VringSetup::inflight`]); those of other rings are submitted again. A ring
    /// without a record is drained, as by [`Self::stop_ring`]. Returns `None` for a ring that is not started.
    ///
    /// # Errors
    /// As for [`Self::stop_ring`].
    pub fn suspend_ring(&self, index: usize, limit: Duration) -> Result<Option<Stopped>, EngineError> {
        let (worker, slot) = self.slot(index)?;
        let answer = self.workers[worker].command_queue.post(|answer| WorkerCommand::Suspend(slot, answer));
        // The time of requests does not begin before the worker knows: a busy processor is no reason for a reset.
        let gone = |_| EngineError::WorkerGone(worker);
        let suspension = match answer.recv().map_err(gone)? {
            Suspension::Waiting => self.await_suspended(worker, index, &answer, limit)?,
            at_once => at_once,
        };
        match suspension {
            Suspension::Stopped(stopped) => Ok(Some(stopped)),
            Suspension::NotStarted | Suspension::Waiting => Ok(None),
            Suspension::NotRecorded => Ok(self.stop_ring(index)?.map(|base| Stopped { base, left: 0 })),
        }
    }

    /// Waits for the second reply. After `limit`, resets the device.
    fn await_suspended(
        &self,
        worker: usize,
        index: usize,
        answer: &Receiver<Suspension>,
        limit: Duration,
    ) -> Result<Suspension, EngineError> {
        match recv_until(answer, Instant::now() + limit) {
            Ok(suspension) => return Ok(suspension),
            Err(RecvTimeoutError::Disconnected) => return Err(EngineError::WorkerGone(worker)),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let mut device = self.supervisor.lock();
        // The last request may have completed while this thread waited for the lock.
        if let Ok(suspension) = answer.try_recv() {
            return Ok(suspension);
        }
        LOG.warn(|| {
            format!(
                "virtqueue {index}: requests have not completed within {limit:?}; the device is reset, and they are left to \
                 whoever serves the ring next"
            )
        });
        self.supervisor.reset_without_blame(&mut device);
        drop(device);
        answer.recv().map_err(|_| EngineError::WorkerGone(worker))
    }

    /// As [`Self::suspend_ring`], after as long as a ring has to drain.
    ///
    /// # Errors
    /// The same.
    pub fn stop_or_suspend_ring(&self, index: usize) -> Result<Option<Stopped>, EngineError> {
        self.suspend_ring(index, self.options.drain_timeout)
    }
}
