//! What a PCI function can be asked when it is passed through whole: its regions and its interrupts by the indices of VFIO
//! (`<linux/vfio.h>`, `VFIO_PCI_*_REGION_INDEX`, `VFIO_PCI_*_IRQ_INDEX`). [`Function`] stays what a driver in this process
//! needs; this adds what a driver in the guest needs.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::hardware::Function;

/// Regions that every PCI function has under VFIO: six BARs, the expansion ROM, configuration space, VGA.
pub const REGIONS: u32 = 9;
/// Interrupt indices that every PCI function has under VFIO: INTx, MSI, MSI-X, ERR, REQ.
pub const IRQS: u32 = 5;
/// The region that is configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const CONFIG_REGION: u32 = 7;
/// The interrupt that asks for the function back (`VFIO_PCI_REQ_IRQ_INDEX`).
pub const REQUEST_IRQ: u32 = 4;

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmapArea {
    /// From the start of the region, bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// How a region can be mapped into another process.
#[derive(Debug)]
pub struct RegionMmap {
    /// What to map.
    pub file: OwnedFd,
    /// Where the region begins in `file`, bytes.
    pub offset: u64,
    /// The mappable parts; empty when the whole region is.
    pub areas: Vec<MmapArea>,
    /// What the holder of `file` can do with it besides mapping, for the log.
    pub rights: &'static str,
}

/// One region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 where the function has no such region.
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
    /// How many vectors; 0 where the function has no such interrupt.
    pub count: u32,
}

/// What a `SET_IRQS` does (`VFIO_IRQ_SET_ACTION_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// The vectors stop signalling.
    Mask,
    /// They signal again.
    Unmask,
    /// They are routed to eventfds, or signalled from here.
    Trigger,
}

/// What a `SET_IRQS` carries for each vector (`VFIO_IRQ_SET_DATA_*`).
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// Nothing. With [`IrqAction::Trigger`] and no vectors, the interrupt is turned off.
    None,
    /// A byte: the action applies where it is not 0.
    Bools(&'a [u8]),
    /// An eventfd, or none to take back the one set before.
    Eventfds(&'a [Option<BorrowedFd<'a>>]),
}

/// One `VFIO_DEVICE_SET_IRQS`.
#[derive(Clone, Copy, Debug)]
pub struct IrqSet<'a> {
    /// Which interrupt.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// How many vectors.
    pub count: u32,
    /// What happens to them.
    pub action: IrqAction,
    /// Data for each.
    pub data: IrqData<'a>,
}

/// A PCI function that can be passed through.
pub trait WholeFunction: Function {
    /// Size and access of region `index`.
    fn region(&self, index: u32) -> RegionInfo;
    /// How a virtual machine monitor can map region `index`; `None` where only [`Self::region_read`] and
    /// [`Self::region_write`] reach it.
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
    /// True if [`Function::reset`] can reset it; some functions have no way to be reset alone.
    fn resettable(&self) -> bool;
    /// Flags and number of vectors of interrupt `index`.
    fn irq(&self, index: u32) -> IrqInfo;
    /// Routes, masks or triggers vectors.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()>;
}
