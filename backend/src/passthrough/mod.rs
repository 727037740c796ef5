//! A whole PCI function, passed through: the guest's own driver drives it. This module decides which parts of the function the
//! guest can access, and in which order it is set up and torn down. It depends neither on the protocol nor on how the
//! function was acquired.
//!
//! ```text
//!   guest's driver ─ loads, stores ─▶ BAR                       direct: not through this process
//!                  ─ configuration ─▶ ConfigSpace ─▶ function   keeps Enable No Snoop clear if the verdict requires it
//!   device ─ interrupt ─▶ eventfd ─▶ KVM                         Interrupts only routes
//!   device ─ DMA ─▶ IOMMU ─▶ guest memory                        DmaMaps: pinned, flushed, then reachable
//! ```
//!
//! [`Passthrough`] owns the function. While it is unassigned, bus master is off, no interrupt is routed and nothing is mapped.
//! An `Assignment` gives it to one virtual machine; dropping the assignment restores that state.
//!
//! A virtual machine monitor that was given the device's own file, to map a BAR, could use it later, or have changed what this
//! process cannot see. So the function is closed at the end of such an assignment and acquired anew before the next one.

mod config_space;
mod dma_maps;
mod error;
mod interrupts;
mod logs;
mod reacquire;
mod regions;
mod replaceable_function;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

pub use error::PassthroughError;
pub use regions::BarAccess;
pub use replaceable_function::{ReacquireError, ReacquireFn, Reacquired};

use crate::coherency::{Coherent, Facts, Verdict, decide};
use crate::hardware::{AddressSpace, Function};
use crate::whole_function::{MSIX_IRQ, REQUEST_IRQ, WholeFunction};
pub(crate) use config_space::ConfigSpace;
pub(crate) use dma_maps::{DmaMap, DmaMaps};
pub(crate) use interrupts::Interrupts;
use logs::Logs;
pub(crate) use regions::Regions;
use replaceable_function::ReplaceableFunction;

/// A function that can be assigned to one virtual machine after another.
pub struct Passthrough {
    function: ReplaceableFunction,
    space: Arc<dyn AddressSpace>,
    bars: BarAccess,
    facts: Facts,
    /// The function has a VFIO device file, by which KVM can be told of it. An emulated function has none and needs none: its
    /// DMA is loads and stores of this process.
    has_vfio_file: bool,
    /// Eventfd, signalled by the function when the host wants it back.
    request: OwnedFd,
    /// `None` if the device's own file is never handed out.
    reacquire: Option<ReacquireFn>,
    /// The process that was given the device's own file last, for the log.
    given_to: Mutex<Option<u32>>,
    logs: Logs,
}

impl Passthrough {
    /// `space` is the address space of `function`, and `facts` decide the verdict on its DMA. `has_vfio_file` is false for an
    /// emulated function, of which KVM need not be told.
    ///
    /// # Errors
    /// The errno of the step that failed.
    pub fn new(
        function: Arc<dyn WholeFunction>,
        space: Arc<dyn AddressSpace>,
        bars: BarAccess,
        facts: Facts,
        has_vfio_file: bool,
    ) -> io::Result<Self> {
        let request = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        route_request(&*function, &request)?;
        if !function.resettable() {
            log::warn!(
                "{}: the kernel cannot reset it; the next virtual machine finds its state as the previous one left it",
                function.name()
            );
        }
        space.require_flush_before_map();
        let (function, given_to, logs) = (ReplaceableFunction::new(function), Mutex::default(), Logs::new());
        Ok(Self { function, space, bars, facts, has_vfio_file, request, reacquire: None, given_to, logs })
    }

    /// Lets a function be served again whose own file was handed out. `reacquire` must attach it to the same address space.
    #[must_use]
    pub fn with_reacquire(self, reacquire: ReacquireFn) -> Self {
        Self { reacquire: Some(reacquire), ..self }
    }

    /// The name a person uses, such as `0000:00:04.0`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.function.name()
    }

    /// The verdict on its DMA, with or without a shim in the virtual machine's process.
    #[must_use]
    pub fn verdict(&self, shim: bool) -> Verdict {
        decide(&Facts { shim: shim || !self.has_vfio_file, ..self.facts })
    }

    /// Readable when the host wants the function back.
    #[must_use]
    pub fn request(&self) -> BorrowedFd<'_> {
        self.request.as_fd()
    }

    /// What is mapped, and what has been.
    #[must_use]
    pub fn space(&self) -> &dyn AddressSpace {
        &*self.space
    }

    /// True if the function can be reset.
    #[must_use]
    pub fn resettable(&self) -> bool {
        self.function.resettable()
    }

    /// True if the function has MSI-X.
    #[must_use]
    pub fn has_msix(&self) -> bool {
        self.function.irq(MSIX_IRQ).count != 0
    }

    /// Assigns the function to a virtual machine. It is reset first, so no state of the previous user is left. If it cannot be
    /// reset, bus master is turned off, so it does no DMA.
    ///
    /// # Errors
    /// The errno of a step; that memory of the previous user is still mapped; that the function cannot be reacquired; or that
    /// Enable No Snoop does not stay clear after the reset.
    pub(crate) fn assign(&self) -> Result<Assignment<'_>, PassthroughError> {
        self.check_unmapped()?;
        self.reacquire()?;
        // A bit that was hardwired when it was probed may not stay so: the guest can load other firmware.
        let no_snoop_clear =
            matches!(self.verdict(true), Verdict::Coherent(Coherent::Disabled { .. } | Coherent::NeverSet));
        let config = ConfigSpace::new(&self.function, no_snoop_clear)?;
        let assignment = Assignment {
            owner: self,
            config,
            interrupts: Interrupts::new(&self.function),
            regions: Regions::new(&self.function, self.bars, &self.logs),
            maps: DmaMaps::new(&*self.space, &self.logs),
        };
        assignment.quiesce().map_err(PassthroughError::function(&self.function, "stop DMA and reset"))?;
        assignment.config.verify()?;
        Ok(assignment)
    }

    /// Refuses if memory is mapped, which can only be that of a previous user: an unmap has failed.
    fn check_unmapped(&self) -> Result<(), PassthroughError> {
        match self.space.statistics().mapped {
            0 => Ok(()),
            bytes => Err(PassthroughError::StillMapped { name: self.name().to_owned(), bytes }),
        }
    }
}

/// Has the host's request for `function` signalled at `request`.
fn route_request(function: &dyn WholeFunction, request: &OwnedFd) -> io::Result<()> {
    if function.irq(REQUEST_IRQ).count != 0 {
        function.route_removal(request.as_fd())?;
    }
    Ok(())
}

/// A function that is assigned to a virtual machine.
pub(crate) struct Assignment<'d> {
    owner: &'d Passthrough,
    pub(crate) config: ConfigSpace<'d>,
    pub(crate) interrupts: Interrupts<'d>,
    pub(crate) regions: Regions<'d>,
    pub(crate) maps: DmaMaps<'d>,
}

impl Assignment<'_> {
    /// Resets the function, on request of the guest or at a reset of the virtual machine. Memory stays mapped.
    ///
    /// # Errors
    /// The errno of the reset, or that Enable No Snoop does not stay clear; bus master is off then.
    pub(crate) fn reset(&self) -> Result<(), PassthroughError> {
        let function = &self.owner.function;
        let reset = function.reset();
        // `and`: verified after a failure as well, since the reset may have happened.
        reset.map_err(PassthroughError::function(function, "reset")).and(self.config.verify())
    }

    /// Stops all DMA of the function, and resets it if it can be reset.
    fn quiesce(&self) -> io::Result<()> {
        let function = &self.owner.function;
        let stopped = function.set_bus_master(false);
        let reset = if function.resettable() { function.reset() } else { Ok(()) };
        stopped.and(reset)
    }

    /// Stops DMA, then interrupts, then unmaps memory. Closes the function if others may have its file.
    fn stop(&mut self) {
        let function = &self.owner.function;
        if let Err(error) = self.quiesce() {
            self.owner.logs.problems.warn(|| format!("{}: stop DMA and reset: {error}", function.name()));
        }
        self.interrupts.release();
        self.maps.unmap_all();
        self.owner.close_if_handed_out();
    }
}

impl Drop for Assignment<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
