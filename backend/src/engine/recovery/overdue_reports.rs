//! Reports of overdue commands, from the workers to the watchdog.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use rustix::event::{EventfdFlags, eventfd};

use crate::driver::OverdueCommands;
use crate::eventfd::{drain, signal};
use crate::sync::Mutex;

/// Reports that the watchdog has not taken yet.
#[derive(Default)]
pub(super) struct Reports {
    pub(super) overdue: OverdueCommands,
    pub(super) quit: bool,
}

/// The reports of all workers, and the eventfd that wakes the watchdog.
pub(in crate::engine) struct OverdueReports {
    reports: Mutex<Reports>,
    pub(super) event: OwnedFd,
}

impl OverdueReports {
    pub(in crate::engine) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { reports: Mutex::default(), event })
    }

    pub(super) fn report(&self, change: impl FnOnce(&mut Reports)) {
        change(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner));
        signal(&self.event);
    }

    /// Drops all reports of overdue commands.
    pub(in crate::engine) fn clear(&self) {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).overdue = OverdueCommands::default();
    }

    pub(super) fn take(&self) -> Reports {
        drain(&self.event);
        std::mem::take(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
