//! What an operator asks of the device. It takes the driver's lock, as resets do.

use std::fmt;

use anyhow::{Result, bail};

use super::DeviceSupervisor;
use super::supervisor::State;
use crate::driver::Driver;

/// Whether the device serves requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// It does.
    Up,
    /// It is being reset, or executes an administrative command.
    Busy,
    /// It does not work, or the host has it back. Requests fail.
    Down,
    /// Another process has it, or it has been shut down.
    Gone,
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Busy => "busy",
            Self::Down => "down",
            Self::Gone => "gone",
        })
    }
}

impl DeviceSupervisor {
    /// Whether the device serves requests. Does not wait for the lock.
    pub(in crate::engine) fn device_state(&self) -> DeviceState {
        self.state_now().map_or(DeviceState::Busy, |state| match state {
            State::Up => DeviceState::Up,
            State::Down => DeviceState::Down,
            State::Lent | State::Left => DeviceState::Gone,
        })
    }

    /// Resets a device that is up. Requests in flight are submitted again.
    pub(in crate::engine) fn reset_on_request(&self) -> Result<()> {
        let mut device = self.lock();
        check_up(device.state)?;
        self.reset(&mut device, None);
        if device.state == State::Up {
            Ok(())
        } else {
            bail!("the device did not come back; the log says why, and it is tried again")
        }
    }

    /// Asks the driver of a device that is up.
    pub(in crate::engine) fn ask<T>(&self, question: impl FnOnce(&mut dyn Driver) -> Result<T>) -> Result<T> {
        let mut device = self.lock();
        check_up(device.state)?;
        question(&mut *device.driver)
    }

    /// Shuts the device down. Nothing is asked of it any more.
    pub(in crate::engine) fn shut_down(&self) {
        let mut device = self.lock();
        device.driver.shut_down();
        device.state = State::Left;
    }
}

fn check_up(state: State) -> Result<()> {
    match state {
        State::Up => Ok(()),
        State::Down => bail!("the device is away; it is asked again when it is back (status says device: up)"),
        State::Lent | State::Left => bail!("another process has the device, or it has been shut down"),
    }
}
