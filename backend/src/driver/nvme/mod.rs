//! NVM Express: a PCIe controller served through its I/O queue pairs (NVMe Base Specification 2.0, NVM Command Set 1.0).
//!
//! ```text
//! Nvme ──> Controller   registers, running state, all memory the device may reach        controller, regs
//!   │        └─ AdminQueue   one command at a time while brought up and down             admin, identify, bring_up
//!   └──> IoQueue ×n     one per worker: submit, ring, reap; no lock, no allocation       queue, rings, prp
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
mod spec;
mod status;

use std::sync::Arc;
use std::time::Duration;

use self::admin::{AdminCommand, AdminQueue};
use self::bring_up::Up;
use self::controller::Controller;
pub use self::error::{Cause, NvmeError};
pub use self::status::Status;
use super::{Driver, Geometry, Queue};
use crate::hardware::{AddressSpace, Function};

/// How long an admin command may take when the controller is told to stop: a healthy one answers at once, and for any
/// other there is CC.SHN.
const LAST_COMMANDS_LIMIT: Duration = Duration::from_millis(500);

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
    controller: Controller,
    options: NvmeOptions,
    geometry: Geometry,
    /// `None` while the controller is stopped.
    admin: Option<AdminQueue>,
    queues: Vec<Box<dyn Queue>>,
    /// How many there are, taken or not.
    queue_count: u16,
    shutdown_limit: Duration,
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
        let up = || {
            let mut controller = Controller::open(function, space)?;
            let up = bring_up::bring_up(&mut controller, &options)?;
            Ok((controller, up))
        };
        let (controller, up) = up().map_err(|cause| NvmeError { function: name, cause })?;
        let geometry = up.geometry.clone();
        let mut nvme = Self {
            controller,
            options,
            geometry,
            admin: None,
            queues: Vec::new(),
            queue_count: 0,
            shutdown_limit: Duration::ZERO,
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
        self.controller.stop()?;
        let options = NvmeOptions { queues: self.queue_count, ..self.options.clone() };
        let up = bring_up::bring_up(&mut self.controller, &options)?;
        self.check_unchanged(&up)?;
        self.install(up);
        Ok(())
    }

    /// Deletes the I/O queues and notifies the controller; each step is tried once, for the next one does not depend on it.
    fn say_goodbye(&mut self, mut admin: AdminQueue) -> Result<(), Cause> {
        let ids = 1..=self.queue_count;
        let deletions = ids
            .clone()
            .map(AdminCommand::delete_submission_queue)
            .chain(ids.map(AdminCommand::delete_completion_queue));
        for command in deletions {
            if let Err(error) = admin.execute(&self.controller, command, LAST_COMMANDS_LIMIT) {
                log::warn!("{}: {error}", self.controller.function().name());
                break;
            }
        }
        self.controller.notify_shutdown(self.shutdown_limit)
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
        let function = self.controller.function().name().to_owned();
        log::warn!("{function}: resetting the controller");
        self.queues.clear();
        self.admin = None;
        if let Err(cause) = self.restart() {
            if let Err(error) = self.controller.stop() {
                log::error!("{function}: {error}");
            }
            return Err(NvmeError { function, cause }.into());
        }
        Ok(self.take_queues())
    }

    fn shut_down(&mut self) {
        self.queues.clear();
        let name = self.controller.function().name().to_owned();
        if let Some(admin) = self.admin.take() {
            match self.say_goodbye(admin) {
                Ok(()) => log::info!("{name}: shut down"),
                Err(error) => log::warn!("{name}: {error}"),
            }
        }
        if let Err(error) = self.controller.stop() {
            log::error!("{name}: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
