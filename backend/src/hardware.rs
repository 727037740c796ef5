//! The traits that stand between the rooms and a device: what a PCI function can be asked, what an address space can be
//! told, and how a cache line is flushed. Drivers, engine and session know only these, so they run unchanged above VFIO and
//! above an emulated function.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::addr::{Iova, Span};
use crate::memory::Region;
use crate::sys::SharedMemory;

/// A block of memory-mapped device registers, addressed in bytes from its start.
///
/// Accesses are little-endian, of exactly the named width, never merged, split or reordered among themselves. A write is
/// ordered after every earlier store of this thread to memory, so a doorbell is never seen before the entry it announces.
/// An offset outside or not aligned to the width is a bug in the driver and panics.
pub trait Registers: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> usize;
    /// Reads 32 bits.
    fn read32(&self, offset: usize) -> u32;
    /// Reads 64 bits.
    fn read64(&self, offset: usize) -> u64;
    /// Writes 32 bits.
    fn write32(&self, offset: usize, value: u32);
    /// Writes 64 bits.
    fn write64(&self, offset: usize, value: u64);
}

/// One PCI function under this process's control.
pub trait Function: Send + Sync {
    /// The name a person uses, such as `0000:00:04.0`.
    fn name(&self) -> &str;
    /// Reads configuration space at `offset` (bytes).
    ///
    /// # Errors
    /// The errno of the kernel; a short read is [`io::ErrorKind::UnexpectedEof`].
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()>;
    /// Writes configuration space at `offset` (bytes).
    ///
    /// # Errors
    /// The errno of the kernel.
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()>;
    /// The registers behind base address register `bar` (0–5), mapped as long as the result lives.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when the function has no such memory BAR; else the errno of `mmap`.
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>>;
    /// How many MSI-X vectors the function has; 0 means no MSI-X.
    fn vectors(&self) -> u16;
    /// Routes MSI-X vectors 0, 1, … to `events` and turns MSI-X on; an empty slice turns it off.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn route_vectors(&self, events: &[BorrowedFd<'_>]) -> io::Result<()>;
    /// Whether somebody waits for `vector`: while this says no, the function may leave its event alone. Whoever says yes
    /// looks once more before the wait. `None` where the function interrupts in any case, as hardware does.
    fn interrupt_wanted(&self, _vector: u16) -> Option<Arc<AtomicBool>> {
        None
    }
    /// Lets the function start DMA and interrupts by itself (PCI command register, Bus Master Enable), or stops it.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn set_bus_master(&self, on: bool) -> io::Result<()>;
    /// Has `event` signalled when the host asks for the function back, as when an administrator unbinds it; that waits until
    /// this process has dropped the function and its registers. Does nothing where nobody asks.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn route_removal(&self, _event: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
    /// Resets the function. Afterwards bus master is off and configuration is as it was at open.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn reset(&self) -> io::Result<()>;
}

/// The device's view of memory: what is mapped here can be reached by DMA, nothing else can.
pub trait AddressSpace: Send + Sync {
    /// Makes `region` reachable at IOVA = GPA. When this returns the device may use it; on error nothing is mapped.
    ///
    /// # Errors
    /// See [`MapError`].
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError>;
    /// Takes `region` away. The caller has made sure that no DMA to it is in flight.
    ///
    /// # Errors
    /// See [`MapError`]; the region then counts as still mapped.
    fn remove(&self, region: &Region) -> Result<(), MapError>;
    /// As [`Self::remove`], for [`MapError::DeviceMustBeIdle`]: the caller has made sure that the device has nothing in flight
    /// at all, and gives it nothing to do meanwhile.
    ///
    /// # Errors
    /// See [`MapError`]; what is left of the region then counts as still mapped.
    fn remove_while_idle(&self, region: &Region) -> Result<(), MapError> {
        self.remove(region)
    }
    /// From now on, memory that cannot be flushed before the device reaches it is refused. Needed where the guest drives the
    /// device: nobody else decides when the device uses memory that is mapped.
    fn require_flush_before_map(&self) {}
    /// What has been done here so far.
    fn statistics(&self) -> SpaceStatistics {
        SpaceStatistics::default()
    }
    /// The device, which does no DMA any more, is about to be given back to the host. What is mapped stays so for the day it
    /// returns, but nothing stays pinned.
    fn release(&self) {}
    /// True from [`Self::release`] until the device is back.
    fn is_released(&self) -> bool {
        false
    }
    /// What makes CPU caches and DRAM agree around each DMA to what is mapped here; `None` where DMA is coherent.
    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        None
    }
    /// True if what is mapped here stays in the pages it had when it was mapped, so that the device loses sight of it when
    /// someone discards it.
    fn pins(&self) -> bool {
        false
    }
    /// Zeroed memory for the driver's own use, mapped until dropped, at an IOVA outside all guest regions.
    ///
    /// # Errors
    /// See [`MapError`].
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError>;
}

/// Makes CPU caches and DRAM agree about a piece of memory, for a device whose DMA goes behind the caches.
pub trait CacheFlush: Send + Sync {
    /// Writes back and invalidates every cache line that holds one of `len` bytes of `shared` from `offset`: the device then
    /// reads what the CPUs wrote, and the CPUs read what the device wrote.
    fn flush(&self, shared: &SharedMemory, offset: usize, len: usize);
}

/// What an address space has done so far, and holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStatistics {
    /// Times memory was mapped: regions and buffers, by pieces; never requests.
    pub maps: u64,
    /// Bytes mapped now, hence pinned.
    pub mapped: u64,
    /// Times memory went through the staging space; 0 under a coherent verdict.
    pub staged: u64,
    /// Bytes flushed before the device could reach them; 0 under a coherent verdict.
    pub flushed_at_map: u64,
    /// Bytes flushed after the device could reach them; 0 under a coherent verdict.
    pub flushed_at_unmap: u64,
    /// Time spent on both.
    pub flush_time: Duration,
}

impl fmt::Display for SpaceStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "maps={} mapped_bytes={} staged={} ", self.maps, self.mapped, self.staged)?;
        write!(f, "map_flushed_bytes={} unmap_flushed_bytes={} ", self.flushed_at_map, self.flushed_at_unmap)?;
        write!(f, "map_flush_us={}", self.flush_time.as_micros())
    }
}

/// Why memory could not be mapped for, or taken away from, the device.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The IOMMU, or a window that the platform reserves (MSI, RMRR), leaves this range out.
    #[error(
        "map {span} for DMA: outside the ranges this IOMMU allows ({allowed}); give the guest less memory, or the machine an IOMMU with a wider address space"
    )]
    NotAllowed {
        /// What was to be mapped.
        span: Span<Iova>,
        /// The ranges that would have been accepted, for the message.
        allowed: String,
    },
    /// Part of the range is mapped already.
    #[error("map {span} for DMA: overlaps {taken}, which is mapped already")]
    Overlap {
        /// What was to be mapped.
        span: Span<Iova>,
        /// The mapping in the way.
        taken: Span<Iova>,
    },
    /// The range is not mapped.
    #[error("unmap {span}: no such mapping")]
    NotMapped {
        /// What was to be unmapped.
        span: Span<Iova>,
    },
    /// The pages would exceed the memory this user may lock.
    #[error(
        "map {span} for DMA: {needed_kib} KiB must be locked, RLIMIT_MEMLOCK allows {allowed_kib} KiB for all processes of this user; raise it (ulimit -l unlimited; LimitMEMLOCK=infinity; --ulimit memlock=-1:-1) or grant CAP_IPC_LOCK"
    )]
    MemLock {
        /// What was to be mapped.
        span: Span<Iova>,
        /// All that would be locked with it, KiB.
        needed_kib: u64,
        /// The soft limit, KiB.
        allowed_kib: u64,
    },
    /// There is no memory to keep the pages pinned while they are flushed, but there is a way that needs none.
    #[error("unmap {span}: no memory to keep it pinned while it is flushed; possible only while the device rests")]
    DeviceMustBeIdle {
        /// What was to be unmapped.
        span: Span<Iova>,
    },
    /// No free IOVA range is left for the driver's own memory.
    #[error("no free IOVA range of {0} bytes for the driver's own memory")]
    NoIova(usize),
    /// The kernel refused.
    #[error("{what} {span}: {source}")]
    Kernel {
        /// The step that failed, such as `IOMMU_IOAS_MAP_FILE`.
        what: &'static str,
        /// The range it was about.
        span: Span<Iova>,
        /// The errno.
        source: io::Error,
    },
    /// Memory for the driver could not be had.
    #[error("allocate {bytes} bytes of DMA memory: {source}")]
    Allocate {
        /// How much.
        bytes: usize,
        /// The errno.
        source: io::Error,
    },
}

/// Memory that both this process and the device see. Dropping it unmaps it, so the driver drops it only after the device
/// has been told to forget it (queue deleted, controller disabled).
pub struct DmaBuffer {
    shared: SharedMemory,
    span: Span<Iova>,
    _mapping: Box<dyn Send + Sync>,
}

impl DmaBuffer {
    /// Joins the two views of one piece of memory; `mapping` is dropped last and takes the device's view away.
    #[must_use]
    pub fn new(shared: SharedMemory, span: Span<Iova>, mapping: Box<dyn Send + Sync>) -> Self {
        assert_eq!(shared.len() as u64, span.len(), "both views have one length");
        Self { shared, span, _mapping: mapping }
    }

    /// This process's view.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.shared
    }

    /// The device's view.
    #[must_use]
    pub fn span(&self) -> Span<Iova> {
        self.span
    }
}
