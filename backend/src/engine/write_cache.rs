//! The write cache's switch (virtio 1.2 §5.2.5, `writeback`). While it is off, a completed write is durable and the driver
//! sends no flush; so what was written before the switch must be flushed here, and no flush may be left out before the
//! device has said that the cache is off.
//!
//! ```text
//! on:   workers pass flushes on ; device: cache on
//! off:  device: cache off ; one flush for what was written before ; workers answer flushes themselves
//! ```

use std::sync::atomic::Ordering;

use super::worker::WorkerCommand;
use super::{Engine, EngineError};
use crate::rate_limited_log::{Limit, SharedLog};

/// A guest can switch it at any time.
static LOG: SharedLog = SharedLog::with_limit(module_path!(), Limit::CONNECTIONS);

impl Engine {
    /// True if completed writes may sit in a volatile cache until a flush.
    #[must_use]
    pub fn write_cache(&self) -> bool {
        self.live.cache_on.load(Ordering::Relaxed)
    }

    /// Switches the volatile write cache; off means that from now on every completed write is durable, those before
    /// included.
    ///
    /// # Errors
    /// [`EngineError::WriteCache`]; flushes then go on reaching the device.
    pub fn set_write_cache(&self, on: bool) -> Result<(), EngineError> {
        if on == self.write_cache() {
            return Ok(());
        }
        let failed = |source| EngineError::WriteCache { on, source };
        if !self.geometry().volatile_cache {
            return Err(failed(anyhow::anyhow!("the device has none")));
        }
        if on {
            self.live.cache_on.store(true, Ordering::Relaxed);
        }
        let switched = self.supervisor.lock().driver.set_write_cache(on);
        switched.map_err(failed)?;
        if !on {
            let answer = self.workers[0].command_queue.post(WorkerCommand::Flush);
            if !self.await_drained(0, &answer, self.deadline(), "the write cache is flushed")? {
                return Err(failed(anyhow::anyhow!("what it holds could not be flushed")));
            }
            self.live.cache_on.store(false, Ordering::Relaxed);
        }
        LOG.info(|| format!("write cache {}", if on { "on" } else { "off" }));
        Ok(())
    }
}
