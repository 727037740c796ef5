//! Interrupts, by what the function has: a vector for each queue, one vector for all, or none.
//!
//! ```text
//! own      vector 0: admin queue    vector n: I/O queue n, one worker each         MSI-X or MSI with two vectors or more
//! shared   vector 0: both queues    the worker wakes up, and the admin queue's     one vector, or INTx
//!                                   handler only if its queue has a completion
//! polled   no vector                a worker polls at intervals while commands are in flight
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::controller::Controller;
use super::error::NvmeErrorKind;
use super::logs::RESETS;
use super::options::{Avoid, InterruptPolicy, NvmeOptions};
use super::rings::CompletionWatch;
use crate::eventfd::signal;
use crate::hardware::{Function, InterruptKind};
use crate::rate_limited_log::RateLimitedLog;

/// See the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wiring {
    Own(InterruptKind),
    Shared(InterruptKind),
    Polled,
}

impl Wiring {
    /// The interrupt vector of I/O queue `id`; `None` if it has none.
    pub(super) fn vector(self, id: u16) -> Option<u16> {
        match self {
            Self::Own(_) => Some(id),
            Self::Shared(_) => Some(0),
            Self::Polled => None,
        }
    }

    /// Unmasks the line, if that is how the controller interrupts: the admin queue's completions have been handled.
    pub(super) fn unmask(self, function: &dyn Function, log: &mut RateLimitedLog) {
        if self.is_line()
            && let Err(error) = function.unmask_intx()
        {
            log.error(|| format!("{}: unmask INTx: {error}", function.name()));
        }
    }

    /// True if interrupts have to be unmasked.
    pub(super) fn is_line(self) -> bool {
        self == Self::Shared(InterruptKind::Intx)
    }
}

impl std::fmt::Display for Wiring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Own(kind) => write!(f, "{kind}"),
            Self::Shared(InterruptKind::Intx) => f.write_str("INTx for all"),
            Self::Shared(kind) => write!(f, "one {kind} vector for all"),
            Self::Polled => f.write_str("no interrupts, polled"),
        }
    }
}

/// The interrupts of a controller.
pub(super) struct Interrupts {
    pub(super) wiring: Wiring,
    /// One for each I/O queue that can be created. Never signalled if polled.
    pub(super) events: Vec<OwnedFd>,
}

impl Interrupts {
    /// Turns on the first kind of interrupt wanted that works, for up to the wanted number of I/O queues. Vector 0 signals
    /// `admin_event` if the admin queue does not share it.
    ///
    /// The controller must be disabled: once it is enabled, it would use INTx, which nobody handles then.
    pub(super) fn route(
        controller: &mut Controller,
        options: &NvmeOptions,
        admin_event: BorrowedFd<'_>,
    ) -> Result<Self, NvmeErrorKind> {
        let NvmeOptions { queues: wanted, interrupts: policy, .. } = *options;
        let one = options.avoid.contains(&Avoid::Vectors);
        let function = controller.function();
        let queues = wanted.max(1).min(controller.last_queue());
        if queues == 0 {
            let found = "large enough for the admin queue only".to_owned();
            return Err(NvmeErrorKind::Unsuitable {
                property: "doorbell area",
                found,
                wanted: "room for one I/O queue",
            });
        }
        for &kind in policy.kinds() {
            match try_vectors(function, kind, if one { 0 } else { queues }, admin_event) {
                Ok(Some(interrupts)) => {
                    controller.set_interrupt(kind);
                    return Ok(interrupts);
                }
                Ok(None) => {}
                Err(error) => RESETS.warn(|| format!("{}: turn {kind} on: {error}; trying without", function.name())),
            }
        }
        controller.mask_interrupts();
        if policy != InterruptPolicy::Poll {
            RESETS.warn(|| format!(
                "{}: has no interrupt that can be used ({policy}); its queues are polled while commands are in flight",
                function.name()
            ));
        }
        Ok(Self { wiring: Wiring::Polled, events: new_events(queues).map_err(NvmeErrorKind::function("eventfd"))? })
    }
}

fn new_events(count: u16) -> std::io::Result<Vec<OwnedFd>> {
    let event = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Into::into);
    (0..count).map(event).collect()
}

/// Routes as many vectors as function and host have, and `queues` need, or one for all. `None` if the function does not have
/// this kind.
fn try_vectors(
    function: &dyn Function,
    kind: InterruptKind,
    queues: u16,
    admin_event: BorrowedFd<'_>,
) -> std::io::Result<Option<Interrupts>> {
    let vectors = function.vectors(kind);
    if vectors == 0 {
        return Ok(None);
    }
    let mut own = if kind == InterruptKind::Intx { 0 } else { queues.min(vectors - 1) };
    while own > 0 {
        let events = new_events(own)?;
        let routed: Vec<_> = std::iter::once(admin_event).chain(events.iter().map(AsFd::as_fd)).collect();
        match function.route_vectors(kind, &routed) {
            Ok(()) => return Ok(Some(Interrupts { wiring: Wiring::Own(kind), events })),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                RESETS
                    .info(|| format!("{}: this host has fewer than {} free {kind} vectors", function.name(), own + 1));
                own /= 2;
            }
            Err(error) => return Err(error),
        }
    }
    let events = new_events(1)?;
    function.route_vectors(kind, &[events[0].as_fd()])?;
    Ok(Some(Interrupts { wiring: Wiring::Shared(kind), events }))
}

/// The interrupt of one completion queue, as its worker uses it.
pub struct QueueInterrupt {
    event: OwnedFd,
    /// See [`Function::interrupt_wanted`].
    wanted: Option<Arc<AtomicBool>>,
    shared: Option<SharedVector>,
    polled: bool,
}

impl QueueInterrupt {
    /// A vector of its own, which signals `event`.
    #[must_use]
    pub fn own(event: OwnedFd, wanted: Option<Arc<AtomicBool>>) -> Self {
        Self { event, wanted, shared: None, polled: false }
    }

    pub(super) fn polled(event: OwnedFd) -> Self {
        Self { event, wanted: None, shared: None, polled: true }
    }

    pub(super) fn shared(event: OwnedFd, wanted: Option<Arc<AtomicBool>>, shared: SharedVector) -> Self {
        Self { event, wanted, shared: Some(shared), polled: false }
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// True if there is none: `event` is never signalled.
    pub(super) fn is_polled(&self) -> bool {
        self.polled
    }

    /// Implements [`Queue::set_interrupt_wanted`](crate::driver::Queue::set_interrupt_wanted).
    pub(super) fn set_wanted(&self, wanted: bool) {
        if let Some(flag) = &self.wanted {
            // The store must be visible before the worker reaps for the last time before it waits. Acquire loads of other
            // memory may come before a store, so this needs the fence.
            flag.store(wanted, Ordering::SeqCst);
            fence(Ordering::SeqCst);
        }
        if wanted && let Some(shared) = &self.shared {
            shared.arm();
        }
    }

    /// Looks after the admin queue while the worker does not wait.
    pub(super) fn tick(&self) {
        if let Some(shared) = &self.shared {
            shared.forward();
        }
    }
}

/// The admin queue's part of a vector that an I/O queue shares with it.
pub(super) struct SharedVector {
    admin: CompletionWatch,
    admin_event: OwnedFd,
    /// The function of an INTx line.
    line: Option<Arc<dyn Function>>,
    log: Mutex<RateLimitedLog>,
}

impl SharedVector {
    pub(super) fn new(admin: CompletionWatch, admin_event: OwnedFd, line: Option<Arc<dyn Function>>) -> Self {
        Self { admin, admin_event, line, log: Mutex::new(RateLimitedLog::new(module_path!())) }
    }

    /// Wakes up the admin queue's handler if that queue has a completion. Returns true if so.
    fn forward(&self) -> bool {
        let pending = self.admin.has_completion();
        if pending {
            signal(&self.admin_event);
        }
        pending
    }

    /// Before the worker waits. A line that the admin queue keeps asserted stays masked until its handler is done: it would
    /// only interrupt again and again.
    fn arm(&self) {
        if !self.forward()
            && let Some(function) = &self.line
            && let Err(error) = function.unmask_intx()
        {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            log.error(|| format!("{}: unmask INTx: {error}", function.name()));
        }
    }
}
