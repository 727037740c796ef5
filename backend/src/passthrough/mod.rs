//! A PCI function as it is passed through whole: the guest's own driver drives it. This room decides what of the function
//! the guest gets and in which order; it knows neither the protocol that asks nor how the function was obtained.
//!
//! ```text
//!   guest's driver ─ loads, stores ─▶ BAR                       direct: nothing of ours on the way
//!                  ─ configuration ─▶ ConfigSpace ─▶ function   Enable No Snoop is held off where the verdict says so
//!   device ─ interrupt ─▶ eventfd ─▶ KVM                         Interrupts only routes
//!   device ─ DMA ─▶ IOMMU ─▶ guest memory                        DmaMaps: pinned, flushed, then reachable
//! ```
//!
//! [`Passthrough`] is the function while nobody uses it: bus master off, no interrupt routed, nothing mapped.
//! `Assignment` is the time that one virtual machine has it; dropping it leads back there.

mod config_space;
mod dma_maps;
mod error;
mod interrupts;
mod regions;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

pub use error::PassthroughError;
pub use regions::BarAccess;

use crate::coherency::{Coherent, Facts, Verdict, decide};
use crate::hardware::AddressSpace;
use crate::whole_function::{REQUEST_IRQ, WholeFunction};
pub(crate) use config_space::ConfigSpace;
pub(crate) use dma_maps::{DmaMap, DmaMaps};
pub(crate) use interrupts::Interrupts;
pub(crate) use regions::Regions;

/// A function that can be given to one virtual machine after another.
pub struct Passthrough {
    function: Arc<dyn WholeFunction>,
    space: Arc<dyn AddressSpace>,
    bars: BarAccess,
    facts: Facts,
    /// There is a file by which KVM can be told of the function. One that is emulated in this process has none, and needs
    /// none: its DMA is this process's own loads and stores.
    known_to_vfio: bool,
    /// Signalled by the function when the host wants it back.
    request: OwnedFd,
}

impl Passthrough {
    /// Takes `function`, whose memory is `space`. `facts` are what the verdict on its DMA rests on. `known_to_vfio` says that
    /// KVM must be told of it where the verdict wants that; false for a function in this process.
    ///
    /// # Errors
    /// The errno of the step that failed.
    pub fn new(
        function: Arc<dyn WholeFunction>,
        space: Arc<dyn AddressSpace>,
        bars: BarAccess,
        facts: Facts,
        known_to_vfio: bool,
    ) -> io::Result<Self> {
        let request = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        if function.irq(REQUEST_IRQ).count != 0 {
            function.route_removal(request.as_fd())?;
        }
        if !function.resettable() {
            log::warn!(
                "{}: the kernel knows no way to reset it; what one virtual machine leaves in it is there for the next",
                function.name()
            );
        }
        space.require_flush_before_map();
        Ok(Self { function, space, bars, facts, known_to_vfio, request })
    }

    /// The name a person uses, such as `0000:00:04.0`.
    #[must_use]
    pub fn name(&self) -> &str {
        self.function.name()
    }

    /// The verdict on its DMA, with or without a shim in the virtual machine's process.
    #[must_use]
    pub fn verdict(&self, shim: bool) -> Verdict {
        decide(&Facts { shim: shim || !self.known_to_vfio, ..self.facts })
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

    /// Gives the function to a virtual machine. It is reset first, so nothing of its former use is left in it. A function
    /// that cannot be reset does no DMA at least: bus master is off.
    ///
    /// # Errors
    /// The function does not come out of the reset as it must be.
    pub(crate) fn assign(&self) -> Result<Assignment<'_>, PassthroughError> {
        let hold_off = matches!(self.verdict(true), Verdict::Coherent(Coherent::HeldOff { .. }));
        let config = ConfigSpace::new(&*self.function, hold_off)?;
        let assignment = Assignment {
            owner: self,
            config,
            interrupts: Interrupts::new(&*self.function),
            regions: Regions::new(&*self.function, self.bars),
            maps: DmaMaps::new(&*self.space),
        };
        assignment.quiesce().map_err(PassthroughError::function(&*self.function, "stop DMA and reset"))?;
        assignment.config.verify()?;
        Ok(assignment)
    }
}

/// A function in the hands of one virtual machine.
pub(crate) struct Assignment<'d> {
    owner: &'d Passthrough,
    pub(crate) config: ConfigSpace<'d>,
    pub(crate) interrupts: Interrupts<'d>,
    pub(crate) regions: Regions<'d>,
    pub(crate) maps: DmaMaps<'d>,
}

impl Assignment<'_> {
    /// Resets the function, as the guest asks for or the virtual machine's own reset. What is mapped stays.
    ///
    /// # Errors
    /// The errno of the reset, or that the function did not come out of it as it must be; it has no bus master then.
    pub(crate) fn reset(&self) -> Result<(), PassthroughError> {
        let function = &*self.owner.function;
        function.reset().map_err(PassthroughError::function(function, "reset"))?;
        self.config.verify()
    }

    /// Stops all DMA of the function, and resets it if it can be reset.
    fn quiesce(&self) -> io::Result<()> {
        let function = &*self.owner.function;
        let stopped = function.set_bus_master(false);
        let reset = if function.resettable() { function.reset() } else { Ok(()) };
        stopped.and(reset)
    }

    /// Takes the function from the virtual machine: DMA stops, then interrupts, then memory is unmapped.
    fn stop(&mut self) {
        let function = &*self.owner.function;
        if let Err(error) = self.quiesce() {
            log::warn!("{}: stop DMA and reset: {error}", function.name());
        }
        self.interrupts.release();
        self.maps.unmap_all();
    }
}

impl Drop for Assignment<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
