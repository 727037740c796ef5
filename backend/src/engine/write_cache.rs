//! Switches the write cache (virtio 1.2 §5.2.5, `writeback`). While it is off, a completed write is durable, and the driver
//! sends no flush. So the engine must flush what was written before the switch. Flushes keep reaching the device until it
//! has confirmed that the cache is off.
//!
//! ```text
//! on:   workers send flushes to the device -> device: cache on, unless the user of another disk wants it off
//! off:  device: cache off -> one flush for earlier writes -> workers complete flushes themselves
//! ```
//!
//! The disks of one device share its cache. It is on while no user wants it off. A user who wants it on sends flushes in any
//! case.

use std::sync::atomic::Ordering;

use super::worker::WorkerCommand;
use super::{Engine, EngineError};
use crate::rate_limited_log::{Limit, SharedLog};

/// A guest can switch it at any time.
static LOG: SharedLog = SharedLog::with_limit(module_path!(), Limit::CONNECTIONS);

impl Engine {
    /// True if completed writes may stay in a volatile cache until a flush.
    #[must_use]
    pub fn write_cache(&self) -> bool {
        self.live.cache_on.load(Ordering::Relaxed)
    }

    /// Switches the volatile write cache. After it is off, every completed write is durable, earlier ones included.
    ///
    /// # Errors
    /// [`EngineError::WriteCache`]. Flushes then still reach the device.
    pub fn set_write_cache(&self, on: bool) -> Result<(), EngineError> {
        if on == self.write_cache() {
            return Ok(());
        }
        let failed = |source| EngineError::WriteCache { on, source };
        if !self.geometry().volatile_cache {
            return Err(failed(anyhow::anyhow!("the device has no volatile write cache")));
        }
        if on {
            self.live.cache_on.store(true, Ordering::Relaxed);
        }
        self.switch(on).map_err(failed)?;
        if !on {
            let answer = self.workers[0].command_queue.post(WorkerCommand::Flush);
            if !self.await_drained(0, &answer, self.deadline(), "flush the write cache")? {
                return Err(failed(anyhow::anyhow!("the device could not flush it")));
            }
            self.live.cache_on.store(false, Ordering::Relaxed);
        }
        LOG.info(|| format!("write cache {}", if on { "on" } else { "off" }));
        Ok(())
    }

    /// Records what the user of this disk wants, and switches the device's cache if that changes what all of them want.
    fn switch(&self, on: bool) -> anyhow::Result<()> {
        let mut device = self.supervisor.lock();
        let before = std::mem::replace(&mut device.write_through[self.disk], !on);
        if on && device.write_through.contains(&true) {
            return Ok(());
        }
        let switched = device.driver.set_write_cache(on);
        if switched.is_err() {
            device.write_through[self.disk] = before;
        }
        switched
    }
}
