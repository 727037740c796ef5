//! One PCI function under VFIO. Each state is a type, and each step consumes the previous state, so the registers of a
//! function that is not attached cannot be accessed.
//!
//! ```text
//!   Opened ── bind(iommufd) ──► Bound ── attach(table) ──► Attached : Function
//!     │ checked in sysfs          │ owned, DMA blocked          │ DMA reaches what `table` or the container maps
//!     │ not opened yet            └ drop: close                 └ drop: bus master off, reset, detach, close
//!     └──── attach_by_group(container) ────────────────────────►
//! ```

mod address;
mod device_files;
mod error;
mod group;
mod hand_over;
mod holder;
mod interface;
mod name;
pub mod no_snoop;
mod passed_in;
mod whole;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};

pub use address::{NotAnAddress, PciAddress};
pub use device_files::{DeviceFile, OpenFn, open_by};
pub use error::VfioError;
pub use holder::{FindFn, find_holder, find_holder_by};
pub use interface::{FoundInterface, InterfaceChoice};
pub use name::FunctionName;
pub use passed_in::PassedIn;

use crate::hardware::{Function, InterruptKind, Registers};
use crate::iommu::PageTable;
use crate::sys::{Cdev, DeviceId, Ioas, Iommufd, Owner};
use crate::whole_function::{IrqAction, IrqData, IrqSet};

/// Command register @ 0x04 : u16 (PCI Local Bus 3.0 §6.2.2).
const COMMAND: u64 = 0x04;
/// Memory Space: the function answers accesses to its memory BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus Master: the function may do DMA, which includes sending MSI-X messages.
const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// Opens `/dev/iommu`.
///
/// # Errors
/// [`VfioError::NoIommufd`].
pub fn open_iommufd(path: &Path) -> Result<Iommufd, VfioError> {
    Iommufd::open(path).map_err(|source| VfioError::no_iommufd(path, source))
}

/// A function that has passed the checks in sysfs. The device has not been opened.
pub struct Opened {
    address: PciAddress,
}

impl Opened {
    /// Finds the function, and checks its driver and its IOMMU group.
    ///
    /// # Errors
    /// What is wrong, and how to fix it.
    pub fn open(address: PciAddress) -> Result<Self, VfioError> {
        if !address.sysfs().exists() {
            return Err(VfioError::NoSuchFunction(address));
        }
        match address.driver() {
            Some(driver) if driver == "vfio-pci" => {}
            Some(driver) => {
                let unbind = format!("echo {address} > /sys/bus/pci/devices/{address}/driver/unbind; ");
                return Err(VfioError::NotBound { address, found: format!("bound to {driver}"), unbind });
            }
            None => {
                let found = "bound to no driver".to_owned();
                return Err(VfioError::NotBound { address, found, unbind: String::new() });
            }
        }
        if address.group().is_none() {
            return Err(VfioError::NoIommu(address));
        }
        Ok(Self { address })
    }

    /// Opens the device and binds it to iommufd. Its DMA is blocked until it is attached.
    ///
    /// # Errors
    /// Why it cannot be bound, such as the process that uses it.
    pub fn bind(self, iommufd: &Iommufd, ioas: &Ioas) -> Result<Bound, VfioError> {
        let file = self.open_cdev()?;
        Bound::new(self.address.into(), file, iommufd, ioas)
    }
}

/// A function that this process owns, with DMA blocked.
pub struct Bound {
    name: FunctionName,
    cdev: Cdev,
    id: DeviceId,
}

impl Bound {
    /// Binds the device whose open character device is `file`.
    fn new(name: FunctionName, file: OwnedFd, iommufd: &Iommufd, ioas: &Ioas) -> Result<Self, VfioError> {
        let cdev = Cdev::bind(file, iommufd, ioas).map_err(|source| VfioError::bind(name, source))?;
        let no_id = || VfioError::bind(name, io::Error::other("a cdev without an iommufd id"));
        let id = cdev.id().ok_or_else(no_id)?;
        Ok(Self { name, cdev, id })
    }

    /// Its iommufd id, for the allocation of a page table.
    #[must_use]
    pub fn device_id(&self) -> DeviceId {
        self.id
    }

    /// Attaches it to `table`. Bus master is off afterwards, so it does no DMA yet.
    ///
    /// # Errors
    /// The errno of the step that failed.
    pub fn attach(self, table: Arc<PageTable>) -> Result<Attached, VfioError> {
        let (name, id) = (self.name, table.id());
        let attached = Attached::new(name, Some(table), self.cdev)?;
        let error = |source| VfioError::Kernel { name, step: "attach to its page table", source };
        attached.cdev.attach(id).map_err(error)?;
        Ok(attached)
    }
}

/// A function whose DMA goes through its page table, or through the container of its group.
pub struct Attached {
    name: String,
    // Before `cdev`, because the page table must be destroyed while its device is still open. `drop` has detached the device
    // before that. `None` with a container.
    table: Option<Arc<PageTable>>,
    cdev: Arc<Cdev>,
}

impl Attached {
    /// Turns bus master off, so that the function does no DMA yet.
    fn new(name: FunctionName, table: Option<Arc<PageTable>>, cdev: Cdev) -> Result<Self, VfioError> {
        let attached = Self { name: name.to_string(), table, cdev: Arc::new(cdev) };
        let off = attached.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER);
        off.map_err(|source| VfioError::Kernel { name, step: "write the command register", source })?;
        Ok(attached)
    }

    /// The device's file, to detach the device and attach it again. It is closed when the function is dropped.
    #[must_use]
    pub fn device_file(&self) -> Weak<Cdev> {
        Arc::downgrade(&self.cdev)
    }

    /// True if it was opened through its group.
    fn is_of_group(&self) -> bool {
        self.table.is_none()
    }

    /// Sets and clears bits of the command register.
    fn set_command(&self, set: u16, clear: u16) -> io::Result<()> {
        let mut bytes = [0; 2];
        self.cdev.read_region(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, &mut bytes)?;
        let command = (u16::from_le_bytes(bytes) & !clear) | set;
        self.cdev.write_region(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, &command.to_le_bytes())
    }
}

fn irq_index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::MsiX => VFIO_PCI_MSIX_IRQ_INDEX,
        InterruptKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::Intx => VFIO_PCI_INTX_IRQ_INDEX,
    }
}

impl Function for Attached {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.cdev.read_region(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), bytes)
    }

    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.check_ours()?;
        self.cdev.write_region(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), bytes)
    }

    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        let region = VFIO_PCI_BAR0_REGION_INDEX + u32::from(bar);
        if bar > 5 || self.cdev.region_size(region) == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(self.cdev.map_region(region)?))
    }

    fn vectors(&self, kind: InterruptKind) -> u16 {
        // PCI Local Bus 3.0 §6.8.2.3: at most 2048 vectors.
        u16::try_from(self.cdev.vectors(irq_index(kind))).unwrap_or(2048)
    }

    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.check_ours()?;
        self.cdev.route_vectors(irq_index(kind), events)
    }

    fn unmask_intx(&self) -> io::Result<()> {
        let (index, action) = (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask);
        self.cdev.set_irqs(&IrqSet { index, start: 0, count: 1, action, data: IrqData::None })
    }

    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.check_ours()?;
        self.cdev.route_vectors(VFIO_PCI_REQ_IRQ_INDEX, &[event])
    }

    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.check_ours()?;
        if on { self.set_command(COMMAND_BUS_MASTER, 0) } else { self.set_command(0, COMMAND_BUS_MASTER) }
    }

    fn reset(&self) -> io::Result<()> {
        self.check_ours()?;
        self.cdev.reset()?;
        self.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER)
    }
}

impl Drop for Attached {
    /// Stops DMA before the page table is destroyed. Every step is tried even if an earlier one fails: all steps fail for a
    /// function that has been unplugged, and such a function does no DMA.
    fn drop(&mut self) {
        match self.cdev.ownership().owner() {
            Owner::ThisProcess => {}
            // The predecessor goes on from here.
            Owner::Predecessor => {
                if let Err(error) = self.set_bus_master(false) {
                    log::warn!("{}: bus master off: {error}", self.name);
                }
                return;
            }
            Owner::Successor => return,
        }
        let reset = if self.cdev.resettable() { self.cdev.reset() } else { Ok(()) };
        let steps: [(&str, io::Result<()>); 3] =
            [("bus master off", self.set_bus_master(false)), ("reset", reset), ("detach", self.cdev.detach())];
        for (step, result) in steps {
            if let Err(error) = result {
                log::warn!("{}: {step}: {error}", self.name);
            }
        }
    }
}
