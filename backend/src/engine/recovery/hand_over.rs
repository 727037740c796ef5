//! Lends the device to another process, and takes it back if that fails. While it is lent, the watchdog leaves it alone, and the
//! workers have no queue: what they had in flight waits.
//!
//! ```text
//!   Up --lend--> Lent --take_back--> Up or Down, as after a reset
//!                     --leave------> Left: the driver is gone
//! ```

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};

use super::DeviceSupervisor;
use super::supervisor::State;
use crate::driver::{CommandId, DiskState, Driver, Geometry, Queue};
use crate::engine::Engine;
use crate::hardware::LeftToSuccessor;

impl DeviceSupervisor {
    /// Takes the workers' queues and stops the device, for another process. On error the device has been reset instead, and the
    /// workers go on.
    pub(in crate::engine) fn lend(&self) -> Result<DiskState> {
        let mut device = self.lock();
        let state = match (device.state, device.driver.disk_state()) {
            (State::Up, Some(state)) => state,
            _ => bail!("the device is away or does not answer, so it cannot be handed over"),
        };
        self.drop_queues();
        if let Err(error) = device.driver.quiesce() {
            self.reset(&mut device, None);
            return Err(error.context("the device cannot be stopped, so it has been reset and is not handed over"));
        }
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        device.state = State::Lent;
        Ok(state)
    }

    /// Takes the device back: stops it, calls `unmap`, which has what the other process mapped unmapped, and brings it up as after
    /// a reset. The requests that waited are submitted.
    pub(in crate::engine) fn take_back(&self, unmap: impl FnOnce()) {
        let mut device = self.lock();
        if device.state != State::Lent {
            return;
        }
        if let Err(error) = device.driver.resume() {
            log::error!("{error:#}; it is tried again");
        }
        unmap();
        device.state = State::Up;
        self.reset(&mut device, None);
    }

    /// Ends the driver of a device that another process owns now.
    pub(in crate::engine) fn leave(&self, left: &LeftToSuccessor) {
        let mut device = self.lock();
        let geometries = device.driver.geometries().to_vec();
        device.state = State::Left;
        std::mem::replace(&mut device.driver, Box::new(LeftDriver(geometries))).leave(left);
    }
}

impl Engine {
    /// Stops the device for another process. Requests in flight wait, and are submitted again by [`Self::take_device_back`]. The
    /// rings must not take further requests meanwhile.
    ///
    /// # Errors
    /// Why it cannot be handed over; the engine goes on.
    pub fn lend_device(&self) -> Result<DiskState> {
        self.supervisor.lend()
    }

    /// After [`Self::lend_device`], if the other process has failed and ended: stops the device, calls `unmap` to have that
    /// process's memory unmapped, brings the device up, and submits the requests that waited. If the device does not come up, it
    /// is tried again at intervals, as after any reset.
    pub fn take_device_back(&self, unmap: impl FnOnce()) {
        self.supervisor.take_back(unmap);
    }

    /// After [`Self::lend_device`], if the other process has taken over: ends the driver. The engine must not be dropped any more,
    /// because that would complete requests that the other process serves.
    pub fn leave_device(&self, left: &LeftToSuccessor) {
        self.supervisor.leave(left);
    }
}

/// In the place of the driver of a device that another process owns.
struct LeftDriver(Vec<Geometry>);

impl Driver for LeftDriver {
    fn geometries(&self) -> &[Geometry] {
        &self.0
    }
    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        Vec::new()
    }
    fn recover(&mut self) -> Result<Vec<Box<dyn Queue>>> {
        bail!("another process has taken the device over")
    }
    fn check(&self) -> Result<()> {
        Ok(())
    }
    fn abort(&mut self, _: &[CommandId]) -> Result<()> {
        Ok(())
    }
    fn removal_request(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn release(&mut self) {}
    fn set_write_cache(&mut self, _: bool) -> Result<()> {
        bail!("another process has taken the device over")
    }
    fn shut_down(&mut self) {}
}
