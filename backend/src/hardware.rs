//! The traits of a PCI function, of its registers, of its address space, and of cache flushing. Drivers, the engine and the
//! sessions use only these traits, so they run unchanged on VFIO and on an emulated function.

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
/// Accesses are little-endian and have exactly the named width. They are not merged, split or reordered among themselves. A
/// write is ordered after every earlier store of this thread to memory, so the device never sees a doorbell before the
/// queue entry. An offset that is out of range or not aligned to the width is a bug in the driver and panics.
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

/// How a PCI function interrupts. One kind is on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptKind {
    /// Messages, each vector with an address and data of its own (PCIe 5.0 §6.1.4.2).
    MsiX,
    /// Messages, at most 32 vectors (PCIe 5.0 §6.1.4.1).
    Msi,
    /// The line INTA# (PCIe 5.0 §6.1.2). It stays asserted until the driver has seen to its cause, so VFIO masks it at each
    /// interrupt, and [`Function::unmask_intx`] must follow.
    Intx,
}

impl fmt::Display for InterruptKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MsiX => "MSI-X",
            Self::Msi => "MSI",
            Self::Intx => "INTx",
        })
    }
}

/// A PCI function that this process owns.
pub trait Function: Send + Sync {
    /// The name for messages, such as `0000:00:04.0`.
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
    /// The registers of base address register `bar` (0–5), mapped as long as the result lives.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if the function has no such memory BAR; else the errno of `mmap`.
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>>;
    /// Number of vectors of this kind; 0 if the function does not have it.
    fn vectors(&self, kind: InterruptKind) -> u16;
    /// Routes vectors 0, 1, … to `events` and turns this kind of interrupt on; an empty slice turns it off.
    ///
    /// # Errors
    /// The errno of the kernel; ENOSPC if the host has fewer free vectors.
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()>;
    /// Unmasks the line, which each interrupt masks. If it is still asserted, the next interrupt follows at once.
    ///
    /// # Errors
    /// The errno of the kernel; [`io::ErrorKind::Unsupported`] without such a line.
    fn unmask_intx(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// A flag for the driver: while it is false, the function may skip the interrupts of `vector`. After setting it, the driver
    /// must poll once more before it waits. `None` if the function ignores such a flag, as hardware does.
    fn interrupt_wanted(&self, _vector: u16) -> Option<Arc<AtomicBool>> {
        None
    }
    /// Sets Bus Master Enable in the PCI command register: allows the function DMA and MSI-X interrupts, or stops them.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn set_bus_master(&self, on: bool) -> io::Result<()>;
    /// Has `event` signalled when the host requests the function back, as when an administrator unbinds it. The unbind blocks
    /// until this process has dropped the function and its registers. By default there are no such requests.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn route_removal(&self, _event: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
    /// Resets the function. Afterwards bus master is off, and configuration space is as it was at open.
    ///
    /// # Errors
    /// The errno of the kernel.
    fn reset(&self) -> io::Result<()>;
}

/// The device's address space: DMA reaches only what is mapped here.
pub trait AddressSpace: Send + Sync {
    /// The ranges in which memory can be mapped, sorted. By default all.
    ///
    /// # Errors
    /// See [`MapError`].
    fn allowed(&self) -> Result<Vec<Span<Iova>>, MapError> {
        Ok(Span::new(Iova(0), u64::MAX).into_iter().collect())
    }
    /// Maps `region` at [`Region::iova`]. After success the device may use it; on error nothing is mapped.
    ///
    /// # Errors
    /// See [`MapError`].
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError>;
    /// Takes over the mapping of `region` from a process that has handed this address space over. By default nothing was handed
    /// over, and this is [`Self::add`].
    ///
    /// # Errors
    /// See [`MapError`].
    fn inherit(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.add(region)
    }
    /// Unmaps `region`. No DMA to it may be in flight.
    ///
    /// # Errors
    /// See [`MapError`]; the region then counts as still mapped.
    fn remove(&self, region: &Region) -> Result<(), MapError>;
    /// As [`Self::remove`], after [`MapError::DeviceMustBeIdle`]. The device must be idle and get no commands until this returns.
    ///
    /// # Errors
    /// See [`MapError`]; the rest of the region then counts as still mapped.
    fn remove_while_idle(&self, region: &Region) -> Result<(), MapError> {
        self.remove(region)
    }
    /// From now on, a map fails if the memory cannot be flushed before the device can reach it. Needed if the guest drives the
    /// device, because the device may then use memory as soon as it is mapped.
    fn require_flush_before_map(&self) {}
    /// Counters since the start, and the bytes mapped now.
    fn statistics(&self) -> SpaceStatistics {
        SpaceStatistics::default()
    }
    /// Allocates a second address space for the same function, which goes on with this one. There is one at a time.
    ///
    /// # Errors
    /// [`MapError::NoSecondSpace`], or the call that failed.
    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        Err(MapError::NoSecondSpace { why: "the interface that maps memory for the function has none".into() })
    }
    /// Must be called before the device is given back to the host, when it does no DMA any more. The mappings are kept until it
    /// is back, but nothing stays pinned.
    fn release(&self) {}
    /// True from [`Self::release`] until the device is back.
    fn is_released(&self) -> bool {
        false
    }
    /// Flushes caches around each DMA to memory mapped here; `None` if DMA is coherent.
    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        None
    }
    /// True if mapped memory is pinned. If such memory is discarded, the device keeps using the old pages.
    fn pins(&self) -> bool {
        false
    }
    /// Allocates zeroed memory for the driver, at an IOVA outside all guest regions. It is mapped until it is dropped.
    ///
    /// # Errors
    /// See [`MapError`].
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError>;
}

/// A second address space of a function, for the memory of the virtual machine that comes next. The driver's buffers are mapped in
/// both, at the same addresses. Guest memory is not: two virtual machines have theirs at the same addresses.
pub trait SecondSpace: Send + Sync {
    /// Where memory is mapped and unmapped. All of it must have been unmapped before this value is dropped.
    fn space(&self) -> Arc<dyn AddressSpace>;
    /// Exchanges the two: the function uses what was mapped here, in one step, and what it used before is mapped here from now on.
    /// The function and its driver must be idle.
    ///
    /// # Errors
    /// Nothing has changed.
    fn exchange(&self) -> Result<(), MapError>;
}

/// Flushes CPU caches, for a device whose DMA bypasses them.
pub trait CacheFlush: Send + Sync {
    /// Writes back and invalidates every cache line of `len` bytes of `shared` from `offset` on. Afterwards the device reads what
    /// the CPUs wrote, and the CPUs read what the device wrote.
    fn flush(&self, shared: &SharedMemory, offset: usize, len: usize);

    /// The most memory that a CPU may write back at once, bytes; a power of two. Data of a device must not share so much with
    /// data of a CPU.
    fn granule(&self) -> u64;
}

/// Counters of an address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStatistics {
    /// Pieces of regions and buffers that were mapped. Requests map nothing.
    pub maps: u64,
    /// Bytes mapped now.
    pub mapped: u64,
    /// Pieces that went through the staging space, in either direction; 0 if DMA is coherent.
    pub staged: u64,
    /// Bytes flushed when they were mapped; 0 if DMA is coherent.
    pub flushed_at_map: u64,
    /// Bytes flushed when they were unmapped; 0 if DMA is coherent.
    pub flushed_at_unmap: u64,
    /// Time of all these flushes.
    pub flush_time: Duration,
}

impl fmt::Display for SpaceStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "maps={} mapped_bytes={} staged={} ", self.maps, self.mapped, self.staged)?;
        write!(f, "map_flushed_bytes={} unmap_flushed_bytes={} ", self.flushed_at_map, self.flushed_at_unmap)?;
        write!(f, "map_flush_us={}", self.flush_time.as_micros())
    }
}

/// Why memory cannot be mapped or unmapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The range is not within the IOMMU's address width, or overlaps a range that the platform reserves (MSI, RMRR).
    #[error(
        "map {span} for DMA: outside the ranges this IOMMU allows ({allowed}); give the guest less memory, or the machine an \
         IOMMU with a wider address space"
    )]
    NotAllowed {
        /// The range to map.
        span: Span<Iova>,
        /// The allowed ranges, as text.
        allowed: String,
    },
    /// Part of the range is mapped already.
    #[error("map {span} for DMA: overlaps {taken}, which is mapped already")]
    Overlap {
        /// The range to map.
        span: Span<Iova>,
        /// The mapping that it overlaps.
        taken: Span<Iova>,
    },
    /// The range is not mapped.
    #[error("unmap {span}: no such mapping")]
    NotMapped {
        /// The range to unmap.
        span: Span<Iova>,
    },
    /// The pages would exceed RLIMIT_MEMLOCK.
    #[error(
        "map {span} for DMA: {needed_kib} KiB must be locked, RLIMIT_MEMLOCK allows {allowed_kib} KiB for {whose}; \
         raise it (ulimit -l unlimited; LimitMEMLOCK=infinity; --ulimit memlock=-1:-1) or grant CAP_IPC_LOCK"
    )]
    MemLock {
        /// The range to map.
        span: Span<Iova>,
        /// Locked memory including this range, in KiB.
        needed_kib: u64,
        /// The soft limit, in KiB.
        allowed_kib: u64,
        /// Whose locked memory the kernel counts.
        whose: &'static str,
    },
    /// The kernel allows fewer mappings.
    #[error(
        "map {span} for DMA: needs {needed} mappings, the kernel allows {left} more for a device; raise \
         vfio_iommu_type1.dma_entry_limit (in /sys/module/vfio_iommu_type1/parameters, for programs that start after that)"
    )]
    TooManyMappings {
        /// The range to map.
        span: Span<Iova>,
        /// Mappings that it needs.
        needed: u64,
        /// Mappings that are left.
        left: u32,
    },
    /// The kernel has no memory to keep the pages pinned during the flush. [`AddressSpace::remove_while_idle`] needs none.
    #[error("unmap {span}: no memory to keep it pinned while it is flushed; possible only while the device is idle")]
    DeviceMustBeIdle {
        /// The range to unmap.
        span: Span<Iova>,
    },
    /// No free IOVA range is left for the driver's own memory.
    #[error("no free IOVA range of {0} bytes for the driver's own memory")]
    NoIova(usize),
    /// A step failed in the kernel.
    #[error("{step} {span}: {source}")]
    Kernel {
        /// The step, such as `IOMMU_IOAS_MAP_FILE`.
        step: &'static str,
        /// The range.
        span: Span<Iova>,
        /// The errno.
        source: io::Error,
    },
    /// The function can have no second address space.
    #[error("no second address space for the function: {why}")]
    NoSecondSpace {
        /// Why not.
        why: String,
    },
    /// The function could not be moved to its second address space.
    #[error("attach the function to its second page table (VFIO_DEVICE_ATTACH_IOMMUFD_PT): {0}")]
    Exchange(io::Error),
    /// Another process is taking the address space over, or has done so.
    #[error(
        "map {span} for DMA: the address space is being handed over to another process; what it has mapped cannot change now"
    )]
    HandOver {
        /// The range to map.
        span: Span<Iova>,
    },
    /// Memory for the driver cannot be allocated.
    #[error("allocate {bytes} bytes of DMA memory: {source}")]
    Allocate {
        /// Bytes.
        bytes: usize,
        /// The errno.
        source: io::Error,
    },
}

/// Proof that another process owns the device and its address space now.
pub struct LeftToSuccessor(());

impl LeftToSuccessor {
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// Memory of this process that is mapped for the device. Dropping it unmaps it, so the device must not use it any more (queue
/// deleted, controller disabled).
pub struct DmaBuffer {
    shared: SharedMemory,
    span: Span<Iova>,
    _mapping: Box<dyn Send + Sync>,
}

impl DmaBuffer {
    /// Combines the two views of one piece of memory. `mapping` unmaps it for the device when it is dropped.
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
