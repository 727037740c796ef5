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

use rustix::event::{EventfdFlags, eventfd};

use self::admin::{AdminCommand, AdminQueue};
use self::bring_up::Up;
use self::controller::Controller;
pub use self::error::{Cause, NvmeError};
use self::identify::{Identity, Namespace};
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
    /// Which namespace to serve; `None`: the only one.
    pub namespace: Option<u32>,
    /// I/O queues wanted, at least one; fewer are made when the function has fewer vectors or the controller grants fewer.
    pub queues: u16,
    /// Report the disk as read-only.
    pub read_only: bool,
}

/// Takes a function that has been given back, once it is there again.
pub type Source = Box<dyn FnMut() -> anyhow::Result<Arc<dyn Function>> + Send>;

/// An NVMe controller that has been brought up. Dropping it stops the controller without a shutdown notification.
pub struct Nvme {
    name: String,
    space: Arc<dyn AddressSpace>,
    /// `None` while it is released.
    controller: Option<Controller>,
    source: Option<Source>,
    /// Signalled when the host wants the function back.
    removal: OwnedFd,
    /// Signalled by the controller for its admin queue.
    notice: OwnedFd,
    /// What the controller said of itself, and the namespace that is served.
    identity: Identity,
    namespace: Namespace,
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
        let up = || {
            let event = || {
                let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
                made.map_err(|errno| Cause::function("eventfd")(errno.into()))
            };
            let (removal, notice) = (event()?, event()?);
            let mut controller = open(function, &space, &removal)?;
            let up = bring_up::bring_up(&mut controller, &options, notice.as_fd())?;
            Ok((controller, up, removal, notice))
        };
        let (controller, up, removal, notice) = up().map_err(|cause| NvmeError { function: name.clone(), cause })?;
        let geometry = up.geometry.clone();
        let mut nvme = Self {
            name,
            space,
            controller: Some(controller),
            source: None,
            removal,
            notice,
            identity: up.identity.clone(),
            namespace: up.namespace.clone(),
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

    /// The same, which can be taken again from `source` after it has been released, for the address space it had.
    #[must_use]
    pub fn returning(self, source: Source) -> Self {
        Self { source: Some(source), ..self }
    }

    fn install(&mut self, up: Up) {
        let Up { admin, geometry, queues, shutdown_limit, identity, namespace } = up;
        self.queue_count = u16::try_from(queues.len()).expect("queue identifiers have 16 bits");
        self.queues = queues.into_iter().map(|queue| Box::new(queue) as Box<dyn Queue>).collect();
        self.admin = Some(admin);
        self.geometry = geometry;
        self.shutdown_limit = shutdown_limit;
        self.identity = identity;
        self.namespace = namespace;
    }

    /// What the controller was brought up for must still be there: a guest cannot be given another disk. It may have grown or
    /// shrunk.
    fn check_unchanged(&self, up: &Up) -> Result<(), Cause> {
        let (before, now) = (&self.geometry.serial, &up.geometry.serial);
        if before != now {
            return Err(Cause::Changed(format!("serial {now} instead of {before}")));
        }
        if let Some(change) = up.namespace.change(&self.namespace) {
            return Err(Cause::Changed(change));
        }
        if up.queues.len() < usize::from(self.queue_count) {
            return Err(Cause::Changed(format!("{} queues instead of {}", up.queues.len(), self.queue_count)));
        }
        Ok(())
    }

    /// Takes a released function again.
    fn retake(&mut self) -> Result<Controller, Cause> {
        let source = self.source.as_mut().ok_or(Cause::Stopped)?;
        let function = source().map_err(Cause::Away)?;
        // A function that is let go of again has to be parted from again, and that is done while it is still attached.
        open(Arc::clone(&function), &self.space, &self.removal).inspect_err(|_| self.space.release())
    }

    fn restart(&mut self) -> Result<(), Cause> {
        if self.controller.is_none() {
            self.controller = Some(self.retake()?);
        }
        let controller = self.controller.as_mut().expect("there now");
        controller.stop()?;
        // The same namespace, whichever others there are by now.
        let options =
            NvmeOptions { namespace: Some(self.namespace.id), queues: self.queue_count, ..self.options.clone() };
        let up = bring_up::bring_up(controller, &options, self.notice.as_fd())?;
        self.check_unchanged(&up)?;
        self.install(up);
        // The reset has switched it back. NVMe 2.0 §5.27.1
        self.write_cache.map_or(Ok(()), |on| self.switch_write_cache(on))
    }

    /// Looks at the namespace again. One that has become another is not served: the controller is to be reset, and does not come
    /// back until it is the former.
    fn measure(&mut self) -> Result<(), Cause> {
        let (Some(admin), Some(controller)) = (&mut self.admin, &self.controller) else { return Err(Cause::Stopped) };
        let namespace = bring_up::identify_namespace(controller, admin, &self.identity, self.namespace.id)?;
        match namespace {
            Some(namespace) => match namespace.change(&self.namespace) {
                Some(change) => return Err(Cause::Changed(change)),
                None => {
                    self.geometry.blocks = namespace.blocks;
                    self.namespace = namespace;
                }
            },
            // Commands to it fail from now on, each by itself.
            None => log::error!("{}: namespace {} is no longer active", self.name, self.namespace.id),
        }
        Ok(())
    }

    /// What the controller has to tell.
    fn hear(&mut self) -> Result<(), Cause> {
        // Type and information of an event. NVMe 2.0 §5.2.1
        const NAMESPACE_CHANGED: u32 = 0x00_02;
        while let (Some(admin), Some(controller)) = (&mut self.admin, &self.controller) {
            match admin.event(controller, RUNNING_LIMIT)? {
                None => break,
                Some(event) if event & 0xff07 == NAMESPACE_CHANGED => self.measure()?,
                Some(event) => log::warn!("{}: reports event {event:#08x}", self.name),
            }
        }
        Ok(())
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

/// Opens `function`, and listens for the host.
fn open(function: Arc<dyn Function>, space: &Arc<dyn AddressSpace>, removal: &OwnedFd) -> Result<Controller, Cause> {
    if let Err(error) = function.route_removal(removal.as_fd()) {
        log::warn!("{}: cannot hear that the host wants it back: {error}", function.name());
    }
    Controller::open(function, Arc::clone(space))
}

impl Driver for Nvme {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        std::mem::take(&mut self.queues)
    }

    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>> {
        let released = self.is_released();
        if !released {
            log::info!("{}: resetting the controller", self.name);
        }
        self.queues.clear();
        self.admin = None;
        if let Err(cause) = self.restart() {
            if released {
                self.release()
            } else {
                self.stop()
            }
            return Err(self.error(cause));
        }
        Ok(self.take_queues())
    }

    fn is_released(&self) -> bool {
        self.controller.is_none()
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

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.notice.as_fd())
    }

    fn handle_events(&mut self) -> anyhow::Result<()> {
        self.hear().map_err(|cause| self.error(cause))
    }

    fn removal_request(&self) -> Option<BorrowedFd<'_>> {
        Some(self.removal.as_fd())
    }

    fn release(&mut self) {
        if self.is_released() {
            return;
        }
        self.shut_down();
        self.space.release();
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
