//! The interface of a PCI function that is passed through whole: its regions and interrupts, by the indices of VFIO
//! (`<linux/vfio.h>`, `VFIO_PCI_*_REGION_INDEX`, `VFIO_PCI_*_IRQ_INDEX`). [`Function`] is what a driver in this process needs;
//! this trait adds what a driver in the guest needs.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::hardware::Function;

/// Regions that every PCI function has under VFIO: six BARs, the expansion ROM, configuration space, VGA.
pub const REGIONS: u32 = 9;
/// Interrupt indices that every PCI function has under VFIO: INTx, MSI, MSI-X, ERR, REQ.
pub const IRQS: u32 = 5;
/// Configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const CONFIG_REGION: u32 = 7;
/// MSI-X (`VFIO_PCI_MSIX_IRQ_INDEX`).
pub const MSIX_IRQ: u32 = 2;
/// The interrupt by which the host requests the function back (`VFIO_PCI_REQ_IRQ_INDEX`).
pub const REQUEST_IRQ: u32 = 4;

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmapArea {
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// How a region can be mapped into another process.
#[derive(Debug)]
pub struct RegionMmap {
    /// The file to map.
    pub file: OwnedFd,
    /// Offset of the region in `file`, in bytes.
    pub offset: u64,
    /// The parts that can be mapped; empty if the whole region can.
    pub areas: Vec<MmapArea>,
    /// `file` is the device's own file, with which its holder can change the function's state. Else it can only be mapped.
    pub own_file: bool,
    /// What `file` is and what its holder can do with it, for the log.
    pub rights: &'static str,
}

/// One region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 if the function has no such region.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_READ`.
    pub readable: bool,
    /// `VFIO_REGION_INFO_FLAG_WRITE`.
    pub writable: bool,
}

/// One interrupt index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Number of vectors; 0 if the function has no such interrupt.
    pub count: u32,
}

/// The action of a `SET_IRQS` (`VFIO_IRQ_SET_ACTION_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask the vectors.
    Mask,
    /// Unmask the vectors.
    Unmask,
    /// Route the vectors to eventfds, or signal them by software.
    Trigger,
}

/// The data of a `SET_IRQS` for each vector (`VFIO_IRQ_SET_DATA_*`).
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// Nothing. With [`IrqAction::Trigger`] and no vectors, the interrupt is turned off.
    None,
    /// A byte: the action applies if it is not 0.
    Bools(&'a [u8]),
    /// An eventfd, or `None` to remove the one set before.
    Eventfds(&'a [Option<BorrowedFd<'a>>]),
}

/// One `VFIO_DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug)]
pub struct IrqSet<'a> {
    /// Interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Number of vectors.
    pub count: u32,
    /// The action.
    pub action: IrqAction,
    /// Data for each vector.
    pub data: IrqData<'a>,
}

/// A PCI function that can be passed through.
pub trait WholeFunction: Function {
    /// Size and access of region `index`.
    fn region(&self, index: u32) -> RegionInfo;
    /// How a virtual machine monitor can map region `index`; `None` if it cannot be mapped, and only [`Self::region_read`] and
    /// [`Self::region_write`] access it.
    ///
    /// # Errors
    /// The errno of duplicating the descriptor.
    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>>;
    /// Reads region `index` at `offset` (bytes). Accesses are as wide as length and alignment allow.
    ///
    /// # Errors
    /// The errno of the kernel; EINVAL outside the region.
    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Writes region `index` at `offset` (bytes).
    ///
    /// # Errors
    /// The errno of the kernel; EINVAL outside the region.
    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// True if [`Function::reset`] can reset it; some functions cannot be reset alone.
    fn resettable(&self) -> bool;
    /// Flags and number of vectors of interrupt `index`.
    fn irq(&self, index: u32) -> IrqInfo;
    /// Routes, masks or triggers vectors.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()>;
}
