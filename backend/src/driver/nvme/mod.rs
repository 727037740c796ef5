//! NVM Express: a PCIe controller served through its I/O queue pairs (NVMe Base Specification 2.0, NVM Command Set 1.0).
//!
//! ```text
//! Nvme ──> Controller   registers, running state, all memory the device may reach        controller, regs
//!   │        └─ AdminQueue   one command at a time while brought up and down             admin, identify, bring_up
//!   └──> IoQueue ×n     one per worker: submit, ring, reap; no lock, no allocation       queue, rings, prp, sgl
//! ```
//!
//! The device is not trusted. Whatever it writes is read once and checked, and it can reach only what the address space
//! was given: guest memory and the rings that its `Controller` keeps.

mod admin;
mod bring_up;
mod controller;
mod error;
mod identify;
pub mod prp;
pub mod queue;
mod regs;
mod rings;
pub mod sgl;
mod spec;
mod status;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use self::admin::{AdminCommand, AdminQueue};
use self::bring_up::Up;
use self::controller::Controller;
pub use self::error::{Cause, NvmeError};
pub use self::status::Status;
use super::{CommandId, Driver, Geometry, Queue};
use crate::hardware::{AddressSpace, Function};

/// How long an admin command may take when the controller is told to stop: a healthy one answers at once, and for any
/// other there is CC.SHN.
const LAST_COMMANDS_LIMIT: Duration = Duration::from_millis(500);

/// How long an admin command may take while requests are served.
const RUNNING_LIMIT: Duration = Duration::from_secs(5);

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct NvmeOptions {
    /// Which namespace to serve; `None`: the first active one.
    pub namespace: Option<u32>,
    /// I/O queues wanted, at least one; fewer are made when the function has fewer vectors or the controller grants fewer.
    pub queues: u16,
    /// Report the disk as read-only.
    pub read_only: bool,
}

/// An NVMe controller that has been brought up. Dropping it stops the controller without a shutdown notification.
pub struct Nvme {
    name: String,
    /// `None` once it has been released.
    controller: Option<Controller>,
    /// Signalled when the host wants the function back.
    removal: Option<OwnedFd>,
    options: NvmeOptions,
    geometry: Geometry,
    /// `None` while the controller is stopped.
    admin: Option<AdminQueue>,
    queues: Vec<Box<dyn Queue>>,
    /// How many there are, taken or not.
    queue_count: u16,
    shutdown_limit: Duration,
    /// What the write cache was switched to, if it was.
    write_cache: Option<bool>,
}

impl Nvme {
    /// Brings the controller behind `function` up; its queue memory comes from `space`.
    ///
    /// # Errors
    /// See [`Cause`]. The function does no DMA then.
    pub fn bring_up(
        function: Arc<dyn Function>,
        space: Arc<dyn AddressSpace>,
        options: NvmeOptions,
    ) -> Result<Self, NvmeError> {
        let name = function.name().to_owned();
        let removal = function.removal_event().unwrap_or_else(|error| {
            log::warn!("{name}: cannot hear that the host wants it back: {error}");
            None
        });
        let up = || {
            let mut controller = Controller::open(function, space)?;
            let up = bring_up::bring_up(&mut controller, &options)?;
            Ok((controller, up))
        };
        let (controller, up) = up().map_err(|cause| NvmeError { function: name.clone(), cause })?;
        let geometry = up.geometry.clone();
        let mut nvme = Self {
            name,
            controller: Some(controller),
            removal,
            options,
            geometry,
            admin: None,
            queues: Vec::new(),
            queue_count: 0,
            shutdown_limit: Duration::ZERO,
            write_cache: None,
        };
        nvme.install(up);
        Ok(nvme)
    }

    fn install(&mut self, up: Up) {
        let Up { admin, geometry, queues, shutdown_limit } = up;
        self.queue_count = u16::try_from(queues.len()).expect("queue identifiers have 16 bits");
        self.queues = queues.into_iter().map(|queue| Box::new(queue) as Box<dyn Queue>).collect();
        self.admin = Some(admin);
        self.geometry = geometry;
        self.shutdown_limit = shutdown_limit;
    }

    /// What the controller was brought up for must still be there: a guest cannot be given another disk.
    fn check_unchanged(&self, up: &Up) -> Result<(), Cause> {
        if let Some(change) = change(&self.geometry, &up.geometry) {
            return Err(Cause::Changed(change));
        }
        if up.queues.len() < usize::from(self.queue_count) {
            return Err(Cause::Changed(format!("{} queues instead of {}", up.queues.len(), self.queue_count)));
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Cause> {
        let controller = self.controller.as_mut().ok_or(Cause::Stopped)?;
        controller.stop()?;
        let options = NvmeOptions { queues: self.queue_count, ..self.options.clone() };
        let up = bring_up::bring_up(controller, &options)?;
        self.check_unchanged(&up)?;
        self.install(up);
        // The reset has switched it back. NVMe 2.0 §5.27.1
        self.write_cache.map_or(Ok(()), |on| self.switch_write_cache(on))
    }

    /// Runs an admin command while requests are served.
    fn execute(&mut self, command: AdminCommand) -> Result<u32, Cause> {
        match (&mut self.admin, &self.controller) {
            (Some(admin), Some(controller)) => admin.execute(controller, command, RUNNING_LIMIT),
            _ => Err(Cause::Stopped),
        }
    }

    fn error(&self, cause: Cause) -> anyhow::Error {
        NvmeError { function: self.name.clone(), cause }.into()
    }

    /// Stops the controller, if that can be done; its failure is logged.
    fn stop(&mut self) {
        self.queues.clear();
        self.admin = None;
        if let Some(Err(error)) = self.controller.as_mut().map(Controller::stop) {
            log::error!("{}: {error}", self.name);
        }
    }

    fn switch_write_cache(&mut self, on: bool) -> Result<(), Cause> {
        self.execute(AdminCommand::set_volatile_write_cache(on)).map(drop)
    }

    /// Deletes the I/O queues and notifies the controller; each step is tried once, for the next one does not depend on it.
    fn say_goodbye(&self, controller: &Controller, mut admin: AdminQueue) -> Result<(), Cause> {
        let ids = 1..=self.queue_count;
        let deletions = ids
            .clone()
            .map(AdminCommand::delete_submission_queue)
            .chain(ids.map(AdminCommand::delete_completion_queue));
        for command in deletions {
            if let Err(error) = admin.execute(controller, command, LAST_COMMANDS_LIMIT) {
                log::warn!("{}: {error}", self.name);
                break;
            }
        }
        controller.notify_shutdown(self.shutdown_limit)
    }
}

/// How the disk has become another one, if it has.
fn change(before: &Geometry, after: &Geometry) -> Option<String> {
    let identity = |geometry: &Geometry| (geometry.blocks, geometry.block_size, geometry.serial.clone());
    let describe = |geometry: &Geometry| {
        format!("{} blocks of {} (serial {})", geometry.blocks, geometry.block_size, geometry.serial)
    };
    (identity(before) != identity(after)).then(|| format!("{} instead of {}", describe(after), describe(before)))
}

impl Driver for Nvme {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        std::mem::take(&mut self.queues)
    }

    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>> {
        log::info!("{}: resetting the controller", self.name);
        self.queues.clear();
        self.admin = None;
        if let Err(cause) = self.restart() {
            self.stop();
            return Err(self.error(cause));
        }
        Ok(self.take_queues())
    }

    fn check(&self) -> anyhow::Result<()> {
        let status = self.controller.as_ref().ok_or(Cause::Stopped).and_then(Controller::status);
        match status {
            Ok(status) if status.fatal() => Err(self.error(Cause::fatal(status))),
            Ok(_) => Ok(()),
            Err(cause) => Err(self.error(cause)),
        }
    }

    fn abort(&mut self, commands: &[CommandId]) -> anyhow::Result<()> {
        for &id in commands {
            match self.execute(AdminCommand::abort(id)) {
                Ok(_) => {}
                // It may be too late for this one, or there are too many Aborts; what counts is whether it comes back.
                Err(error @ Cause::Command { .. }) => log::warn!("{}: {error}", self.name),
                Err(cause) => return Err(self.error(cause)),
            }
        }
        Ok(())
    }

    fn removal(&self) -> Option<BorrowedFd<'_>> {
        self.removal.as_ref().map(AsFd::as_fd)
    }

    fn release(&mut self) {
        self.shut_down();
        self.controller = None;
    }

    fn set_write_cache(&mut self, on: bool) -> anyhow::Result<()> {
        self.switch_write_cache(on).map_err(|cause| self.error(cause))?;
        self.write_cache = Some(on);
        Ok(())
    }

    fn shut_down(&mut self) {
        self.queues.clear();
        if let (Some(admin), Some(controller)) = (self.admin.take(), &self.controller) {
            match self.say_goodbye(controller, admin) {
                Ok(()) => log::info!("{}: shut down", self.name),
                Err(error) => log::warn!("{}: {error}", self.name),
            }
        }
        self.stop();
    }
}

#[cfg(test)]
mod tests;
