//! NVMe driver for a PCIe controller (NVMe Base Specification 2.0, NVM Command Set 1.0, Zoned Namespace Command Set 1.1).
//!
//! ```text
//! Nvme ──> Controller      registers, state, all memory the device may access            controller, regs
//!   ├────> AdminQueue      one command at a time                                         admin, identify, bring_up
//!   └────> IoQueue ×n      one per worker: submit, ring, reap; no lock, no allocation    queue, rings, prp, sgl, zones
//! ```
//!
//! The device is not trusted. Everything it writes is read once and then checked. It can access only what is mapped in its
//! address space: guest memory, bounce buffers, and the queue memory that `Controller` owns.

mod admin;
mod bring_up;
mod command_limits;
mod command_set;
mod controller;
mod error;
mod hand_over;
mod health;
mod identify;
mod interrupts;
mod logs;
mod namespaces;
mod options;
mod path;
pub mod prp;
pub mod queue;
mod regs;
mod rings;
pub mod sgl;
mod shut_down;
mod spec;
mod status;
mod tags;
mod zones;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use self::admin::{AdminCommand, AdminQueue};
use self::bring_up::BroughtUp;
use self::controller::{Controller, open};
pub use self::error::{NvmeError, NvmeErrorKind};
use self::identify::{Identity, Namespace};
use self::interrupts::Wiring;
use self::logs::RESETS;
pub use self::options::{Avoid, InterruptPolicy, NvmeOptions, ReacquireFn};
pub use self::status::Status;
use super::{CommandId, DiskState, Driver, Geometry, Health, Identification, Queue};
use crate::eventfd::signal;
use crate::hardware::{AddressSpace, Function, LeftToSuccessor};
use crate::rate_limited_log::RateLimitedLog;

/// Time-out of an admin command while requests are served.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Asynchronous events handled at a time. A controller reports an event, waits until its log page has been read, and reports
/// the next; one that has more than these ready does not follow the protocol.
const MAX_EVENTS: u32 = 64;

/// An initialized NVMe controller. Dropping it stops the controller without a shutdown notification.
pub struct Nvme {
    name: String,
    space: Arc<dyn AddressSpace>,
    /// `None` while the function is released.
    controller: Option<Controller>,
    reacquire: Option<ReacquireFn>,
    /// Eventfd, signalled when the host requests the function back.
    removal_request: OwnedFd,
    /// Eventfd that reports a completion in the admin queue.
    admin_event: OwnedFd,
    wiring: Wiring,
    identity: Identity,
    /// The namespaces served, as last identified, and what their users see.
    namespaces: Vec<Namespace>,
    geometries: Vec<Geometry>,
    options: NvmeOptions,
    /// `None` while the controller is stopped.
    admin: Option<AdminQueue>,
    queues: Vec<Box<dyn Queue>>,
    /// Number of I/O queues, including those moved out by `take_queues`.
    queue_count: u16,
    shutdown_limit: Duration,
    /// The last setting made by `set_write_cache`, which a recovery repeats.
    write_cache: Option<bool>,
    /// For what a misbehaving controller can cause.
    log: RateLimitedLog,
}

impl Nvme {
    /// Initializes the controller of `function`; queue memory is allocated in `space`.
    ///
    /// # Errors
    /// See [`NvmeErrorKind`]. The function does no DMA after an error.
    pub fn bring_up(
        function: Arc<dyn Function>,
        space: Arc<dyn AddressSpace>,
        options: NvmeOptions,
    ) -> Result<Self, NvmeError> {
        let name = function.name().to_owned();
        let up = || {
            let event = || {
                let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
                made.map_err(|errno| NvmeErrorKind::function("eventfd")(errno.into()))
            };
            let (removal_request, admin_event) = (event()?, event()?);
            let mut controller = open(function, &space, &removal_request)?;
            let up = bring_up::bring_up(&mut controller, &options, admin_event.as_fd())?;
            Ok((controller, up, removal_request, admin_event))
        };
        let (controller, up, removal_request, admin_event) =
            up().map_err(|kind| NvmeError { function: name.clone(), kind })?;
        let mut nvme = Self {
            name,
            space,
            controller: Some(controller),
            reacquire: None,
            removal_request,
            admin_event,
            wiring: up.wiring,
            identity: up.identity.clone(),
            namespaces: Vec::new(),
            geometries: Vec::new(),
            options,
            admin: None,
            queues: Vec::new(),
            queue_count: 0,
            shutdown_limit: Duration::ZERO,
            write_cache: None,
            log: RateLimitedLog::new(module_path!()),
        };
        nvme.install(up);
        Ok(nvme)
    }

    /// Lets [`Driver::recover`] reacquire the function after a release. `reacquire` must attach it to the same address space.
    #[must_use]
    pub fn with_reacquire(self, reacquire: ReacquireFn) -> Self {
        Self { reacquire: Some(reacquire), ..self }
    }

    fn install(&mut self, up: BroughtUp) {
        let BroughtUp { admin, geometries, queues, shutdown_limit, identity, namespaces, wiring } = up;
        self.wiring = wiring;
        self.queue_count = u16::try_from(queues.len()).expect("queue identifiers have 16 bits");
        self.queues = queues.into_iter().map(|queue| Box::new(queue) as Box<dyn Queue>).collect();
        self.admin = Some(admin);
        self.geometries = geometries;
        self.shutdown_limit = shutdown_limit;
        self.identity = identity;
        self.namespaces = namespaces;
    }

    /// Checks that each guest keeps the disk it has: same serial number and namespace. The size may differ.
    fn check_unchanged(&self, up: &BroughtUp) -> Result<(), NvmeErrorKind> {
        let (before, now) = (&self.identity.serial, &up.identity.serial);
        if before != now {
            return Err(NvmeErrorKind::Changed(format!("serial {now} instead of {before}")));
        }
        let mut pairs = up.namespaces.iter().zip(&self.namespaces);
        if let Some(difference) = pairs.find_map(|(now, before)| now.difference(before)) {
            return Err(NvmeErrorKind::Changed(difference));
        }
        if up.queues.len() < usize::from(self.queue_count) {
            return Err(NvmeErrorKind::Changed(format!("{} queues instead of {}", up.queues.len(), self.queue_count)));
        }
        Ok(())
    }

    /// Reacquires a released function.
    fn reacquire(&mut self) -> Result<Controller, NvmeErrorKind> {
        let reacquire = self.reacquire.as_mut().ok_or(NvmeErrorKind::Stopped)?;
        let function = reacquire().map_err(NvmeErrorKind::Released)?;
        // On error the function is dropped. The space must be released before that, while the function is still attached.
        open(Arc::clone(&function), &self.space, &self.removal_request).inspect_err(|_| self.space.release())
    }

    fn restart(&mut self) -> Result<(), NvmeErrorKind> {
        if self.controller.is_none() {
            self.controller = Some(self.reacquire()?);
        }
        let controller = self.controller.as_mut().expect("reacquired above");
        controller.stop()?;
        // Keep the namespaces, even if others have become active since.
        let namespaces = self.namespaces.iter().map(|namespace| namespace.id).collect();
        let options = NvmeOptions { namespaces, queues: self.queue_count, ..self.options.clone() };
        let up = bring_up::bring_up(controller, &options, self.admin_event.as_fd())?;
        self.check_unchanged(&up)?;
        self.install(up);
        // A reset restores the default. NVMe 2.0 §5.27.1
        self.write_cache.map_or(Ok(()), |on| self.switch_write_cache(on))
    }

    /// Identifies the namespaces again. Fails if one is not the same any more; recovery then fails as well until the former
    /// namespace is back.
    fn refresh_namespaces(&mut self) -> Result<(), NvmeErrorKind> {
        let (Some(admin), Some(controller)) = (&mut self.admin, &self.controller) else {
            return Err(NvmeErrorKind::Stopped);
        };
        for (before, geometry) in self.namespaces.iter_mut().zip(&mut self.geometries) {
            match namespaces::identify_namespace(controller, admin, &self.identity, before.id)? {
                Some(now) => match now.difference(before) {
                    Some(difference) => return Err(NvmeErrorKind::Changed(difference)),
                    None => {
                        geometry.blocks = now.blocks;
                        *before = now;
                    }
                },
                // No error: the device fails each further command to it.
                None => self.log.error(|| format!("{}: namespace {} is no longer active", self.name, before.id)),
            }
        }
        Ok(())
    }

    /// Handles all pending asynchronous events.
    fn process_events(&mut self) -> Result<(), NvmeErrorKind> {
        // Asynchronous event type (bits 2:0) and information (bits 15:8). NVMe 2.0 §5.2.1
        const NAMESPACE_CHANGED: u32 = 0x00_02;
        for _ in 0..MAX_EVENTS {
            let (Some(admin), Some(controller)) = (&mut self.admin, &self.controller) else { return Ok(()) };
            match admin.next_event(controller, COMMAND_TIMEOUT)? {
                None => return Ok(()),
                Some(event) if event & 0xff07 == NAMESPACE_CHANGED => self.refresh_namespaces()?,
                Some(event) => self.log.warn(|| format!("{}: unhandled asynchronous event {event:#08x}", self.name)),
            }
        }
        if let Some(admin) = &mut self.admin {
            admin.ignore_events();
        }
        self.log.warn(|| {
            format!(
                "{}: {MAX_EVENTS} asynchronous events at once; the next ones are ignored until the controller is reset",
                self.name
            )
        });
        Ok(())
    }

    /// Executes an admin command while requests are served.
    fn execute(&mut self, command: AdminCommand) -> Result<u32, NvmeErrorKind> {
        match (&mut self.admin, &self.controller) {
            (Some(admin), Some(controller)) => {
                let result = admin.execute(controller, command, COMMAND_TIMEOUT);
                // The interrupt of an event that was taken from the queue on the way may find nothing any more.
                if admin.has_event() {
                    signal(&self.admin_event);
                }
                result
            }
            _ => Err(NvmeErrorKind::Stopped),
        }
    }

    fn error(&self, kind: NvmeErrorKind) -> anyhow::Error {
        NvmeError { function: self.name.clone(), kind }.into()
    }

    /// Stops the controller; a failure is only logged.
    fn stop(&mut self) {
        self.queues.clear();
        self.admin = None;
        if let Some(Err(error)) = self.controller.as_mut().map(Controller::stop) {
            RESETS.error(|| format!("{}: {error}", self.name));
        }
    }

    fn switch_write_cache(&mut self, on: bool) -> Result<(), NvmeErrorKind> {
        self.execute(AdminCommand::set_volatile_write_cache(on)).map(drop)
    }
}

impl Driver for Nvme {
    fn geometries(&self) -> &[Geometry] {
        &self.geometries
    }

    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        std::mem::take(&mut self.queues)
    }

    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>> {
        let released = self.is_released();
        if !released {
            RESETS.info(|| format!("{}: resetting the controller", self.name));
        }
        self.queues.clear();
        self.admin = None;
        if let Err(kind) = self.restart() {
            if released {
                self.release()
            } else {
                self.stop()
            }
            return Err(self.error(kind));
        }
        Ok(self.take_queues())
    }

    fn is_released(&self) -> bool {
        self.controller.is_none()
    }

    fn check(&self) -> anyhow::Result<()> {
        let status = self.controller.as_ref().ok_or(NvmeErrorKind::Stopped).and_then(Controller::status);
        match status {
            Ok(status) if status.fatal() => Err(self.error(NvmeErrorKind::fatal(status))),
            Ok(_) => Ok(()),
            Err(kind) => Err(self.error(kind)),
        }
    }

    fn abort(&mut self, commands: &[CommandId]) -> anyhow::Result<()> {
        for &id in commands {
            match self.execute(AdminCommand::abort(id)) {
                Ok(_) => {}
                // The command may have completed, or the Abort limit is reached. Only a missing completion matters.
                Err(error @ NvmeErrorKind::CommandFailed { .. }) => RESETS.warn(|| format!("{}: {error}", self.name)),
                Err(kind) => return Err(self.error(kind)),
            }
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.admin_event.as_fd())
    }

    fn is_polled(&self) -> bool {
        self.wiring == Wiring::Polled
    }

    fn handle_events(&mut self) -> anyhow::Result<()> {
        let result = self.process_events();
        if let Some(controller) = &self.controller {
            self.wiring.unmask(controller.function(), &mut self.log);
        }
        result.map_err(|kind| self.error(kind))
    }

    fn removal_request(&self) -> Option<BorrowedFd<'_>> {
        Some(self.removal_request.as_fd())
    }

    fn release(&mut self) {
        if self.is_released() {
            return;
        }
        self.shut_down();
        self.space.release();
        self.controller = None;
    }

    fn identification(&self, disk: usize) -> anyhow::Result<Identification> {
        Ok(self.identify_for_operator(disk))
    }

    fn health(&mut self) -> anyhow::Result<Health> {
        self.read_health().map_err(|kind| self.error(kind))
    }

    fn disk_state(&self) -> Option<DiskState> {
        self.state_for_successor()
    }

    fn quiesce(&mut self) -> anyhow::Result<()> {
        self.stop_for_successor().map_err(|kind| self.error(kind))
    }

    fn resume(&mut self) -> anyhow::Result<()> {
        self.stop_after_successor().map_err(|kind| self.error(kind))
    }

    fn leave(self: Box<Self>, _left: &LeftToSuccessor) {
        self.leave_to_successor();
    }

    fn set_write_cache(&mut self, on: bool) -> anyhow::Result<()> {
        self.switch_write_cache(on).map_err(|kind| self.error(kind))?;
        self.write_cache = Some(on);
        Ok(())
    }

    fn shut_down(&mut self) {
        self.queues.clear();
        if let (Some(admin), Some(controller)) = (self.admin.take(), &self.controller) {
            match self.delete_queues_and_shut_down(controller, admin) {
                Ok(()) => RESETS.info(|| format!("{}: shut down", self.name)),
                Err(error) => RESETS.warn(|| format!("{}: {error}", self.name)),
            }
        }
        self.stop();
    }
}

#[cfg(test)]
mod tests;
