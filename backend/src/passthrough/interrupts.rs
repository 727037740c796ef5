//! Interrupts: the virtual machine's eventfds are passed to the function, so a device interrupt reaches KVM without this
//! process. Each descriptor is checked on arrival: the kernel or this process will write to it.
//!
//! State is kept for two purposes:
//!
//! - An interrupt that cannot grow while it is on (`VFIO_IRQ_INFO_NORESIZE`: MSI, and MSI-X on devices without dynamic
//!   vectors) must be turned off and on again with all its eventfds when vectors are added. A client sends only as many eventfds
//!   at a time as one message can carry, so the earlier ones are kept here. With them, a change that fails is undone.
//! - The host's request for the function (REQ) goes to this process. It forwards the request to the virtual machine and starts
//!   the time-out. No command of the virtual machine for REQ reaches the function: VFIO would signal this process's own eventfd
//!   on demand (`VFIO_IRQ_SET_DATA_NONE`, `VFIO_IRQ_SET_DATA_BOOL`), as if the host had asked.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_IRQ_INFO_NORESIZE;

use crate::eventfd;
use crate::foreign_fd::check_eventfd;
use crate::rate_limited_log::RateLimitedLog;
use crate::rate_limited_log::SharedLog;
use crate::whole_function::{IRQS, IrqAction, IrqData, IrqInfo, IrqSet, REQUEST_IRQ, WholeFunction};

use super::PassthroughError;

/// Each front-end that leaves turns interrupts off.
static LOG: SharedLog = SharedLog::new(module_path!());

/// The eventfds of an interrupt, from vector 0 on.
type Vectors = Vec<Option<Arc<OwnedFd>>>;

/// See the top of this file.
pub(crate) struct Interrupts<'d> {
    function: &'d dyn WholeFunction,
    /// By index: the eventfds of an interrupt that cannot grow and is on.
    fixed: BTreeMap<u32, Vectors>,
    /// Indices of the interrupts that are on.
    on: BTreeSet<u32>,
    /// The eventfd that asks the virtual machine to unplug the function.
    request: Option<Arc<OwnedFd>>,
    /// For interrupts that could not be restored.
    lost: RateLimitedLog,
}

impl<'d> Interrupts<'d> {
    pub(super) fn new(function: &'d dyn WholeFunction) -> Self {
        let lost = RateLimitedLog::new(module_path!());
        Self { function, fixed: BTreeMap::new(), on: BTreeSet::new(), request: None, lost }
    }

    /// Flags and number of vectors; all zero if the function does not have the interrupt.
    pub(crate) fn info(&self, index: u32) -> IrqInfo {
        if index < IRQS { self.function.irq(index) } else { IrqInfo::default() }
    }

    /// Asks the virtual machine to unplug the function. False if it has set no eventfd for that.
    ///
    /// Never waits for the virtual machine: it can make its eventfd full and blocking at any time. Once for each request of the
    /// host, because a thread may stay behind.
    pub(crate) fn request_unplug(&self) -> bool {
        let Some(event) = &self.request else { return false };
        let signalled = eventfd::signal_in_background(event);
        if let Err(error) = &signalled {
            log::warn!("{}: start a thread to ask the virtual machine: {error}", self.function.name());
        }
        signalled.is_ok()
    }

    /// `VFIO_USER_DEVICE_SET_IRQS`. `fds` are the eventfds of an [`IrqData::Eventfds`]; an empty list removes them.
    pub(crate) fn set(&mut self, set: &IrqSet<'_>, fds: Vec<OwnedFd>) -> Result<(), PassthroughError> {
        let IrqSet { index, start, count, .. } = *set;
        let available = self.info(index).count;
        if index >= IRQS || start.checked_add(count).is_none_or(|end| end > available) {
            return Err(PassthroughError::Vectors { index, start, count, available });
        }
        for (vector, fd) in (start..).zip(&fds) {
            check_eventfd(fd).map_err(|source| PassthroughError::Eventfd { index, vector, source })?;
        }
        let eventfds = matches!(set.data, IrqData::Eventfds(_));
        match (index, set.action) {
            (REQUEST_IRQ, _) => self.set_request(set, fds),
            (_, IrqAction::Trigger) if eventfds && self.info(index).flags & VFIO_IRQ_INFO_NORESIZE != 0 => {
                self.route_fixed(index, start, count, fds)
            }
            _ => self.forward(set, &fds),
        }
    }

    /// Sets or removes the eventfd of the request interrupt, for this process alone.
    fn set_request(&mut self, set: &IrqSet<'_>, fds: Vec<OwnedFd>) -> Result<(), PassthroughError> {
        match (set.action, set.data, set.count) {
            (IrqAction::Trigger, IrqData::Eventfds(_), 1) => {
                fds.iter().for_each(eventfd::make_nonblocking);
                self.request = fds.into_iter().next().map(Arc::new);
                Ok(())
            }
            (IrqAction::Trigger, IrqData::None, 0) => {
                self.request = None;
                Ok(())
            }
            _ => Err(PassthroughError::Request),
        }
    }

    fn forward(&mut self, set: &IrqSet<'_>, fds: &[OwnedFd]) -> Result<(), PassthroughError> {
        let absent = vec![None; set.count as usize];
        let present: Vec<_> = fds.iter().map(|fd| Some(fd.as_fd())).collect();
        let data = match set.data {
            IrqData::Eventfds(_) if fds.is_empty() => IrqData::Eventfds(&absent),
            IrqData::Eventfds(_) => IrqData::Eventfds(&present),
            other => other,
        };
        self.apply(&IrqSet { data, ..*set })?;
        if set.action == IrqAction::Trigger {
            match (set.count, set.data) {
                (0, IrqData::None) => {
                    self.on.remove(&set.index);
                    self.fixed.remove(&set.index);
                }
                (_, IrqData::Eventfds(_)) => _ = self.on.insert(set.index),
                _ => {}
            }
        }
        Ok(())
    }

    /// Routes vectors of an interrupt that cannot grow while it is on.
    fn route_fixed(&mut self, index: u32, start: u32, count: u32, fds: Vec<OwnedFd>) -> Result<(), PassthroughError> {
        let (from, to) = (start as usize, (start + count) as usize);
        let former = self.fixed.get(&index).cloned().unwrap_or_default();
        let grows = to > former.len();
        let mut routed = former.clone();
        routed.resize_with(routed.len().max(to), || None);
        let mut fds = fds.into_iter().map(Arc::new);
        routed[from..to].iter_mut().for_each(|slot| *slot = fds.next());
        // VFIO keeps vectors allocated that have no eventfd, and refuses to turn off what is off.
        if routed.iter().all(Option::is_none) {
            return if former.is_empty() { Ok(()) } else { self.turn_off(index) };
        }
        if grows && !former.is_empty() {
            self.turn_off(index)?;
        }
        let range = if grows { 0..to } else { from..to };
        if let Err(error) = self.route(index, &routed, range.clone()) {
            self.restore(index, former, range);
            return Err(error);
        }
        self.on.insert(index);
        self.fixed.insert(index, routed);
        Ok(())
    }

    /// Routes vectors `range` of `vectors`.
    fn route(&self, index: u32, vectors: &Vectors, range: Range<usize>) -> Result<(), PassthroughError> {
        let (start, count) = (number(range.start), number(range.len()));
        let events: Vec<Option<BorrowedFd<'_>>> =
            vectors[range].iter().map(|fd| fd.as_ref().map(|fd| fd.as_fd())).collect();
        self.apply(&IrqSet { index, start, count, action: IrqAction::Trigger, data: IrqData::Eventfds(&events) })
    }

    /// Undoes a [`Self::route`] of `range` that has failed. VFIO has then removed the eventfds of that range, or, where it was
    /// to turn the interrupt on, has left it off (`vfio_pci_set_msi_trigger`). If not even this succeeds, the interrupt is off.
    fn restore(&mut self, index: u32, former: Vectors, range: Range<usize>) {
        if former.is_empty() {
            return;
        }
        let range = if range.end > former.len() { 0..former.len() } else { range };
        let Err(error) = self.route(index, &former, range) else {
            self.on.insert(index);
            self.fixed.insert(index, former);
            return;
        };
        self.lost.error(|| format!("interrupt {index} is off until the guest sets it up again: restore it: {error}"));
        if let Err(error) = self.turn_off(index) {
            self.lost.error(|| error.to_string());
        }
        self.fixed.remove(&index);
    }

    fn turn_off(&mut self, index: u32) -> Result<(), PassthroughError> {
        self.apply(&IrqSet { index, start: 0, count: 0, action: IrqAction::Trigger, data: IrqData::None })?;
        self.on.remove(&index);
        self.fixed.remove(&index);
        Ok(())
    }

    fn apply(&self, set: &IrqSet<'_>) -> Result<(), PassthroughError> {
        let error = PassthroughError::function(self.function, "VFIO_DEVICE_SET_IRQS");
        self.function.set_irqs(set).map_err(|source| match source.raw_os_error() {
            Some(libc::ENOSPC) => PassthroughError::NoVectors { index: set.index, count: set.count },
            _ => error(source),
        })
    }

    /// Turns every interrupt off, and closes the virtual machine's eventfds.
    pub(super) fn release(&mut self) {
        for index in std::mem::take(&mut self.on) {
            if let Err(error) = self.turn_off(index) {
                LOG.warn(|| format!("turn interrupt {index} off: {error}"));
            }
        }
        self.fixed.clear();
        self.request = None;
    }
}

fn number(vectors: usize) -> u32 {
    u32::try_from(vectors).expect("at most the vectors of the function")
}

#[cfg(test)]
mod tests;
