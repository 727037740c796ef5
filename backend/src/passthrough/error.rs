//! Why a request of a virtual machine to its function has failed.

use std::io;

use crate::addr::{Gpa, Span};
use crate::hardware::{Function, MapError};
use crate::memory::RegionError;

/// See the top of this file. The protocol carries only [`Self::errno`]; the text is logged.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// A step on the function failed.
    #[error("{name}: {step}: {source}")]
    Function {
        /// The function.
        name: String,
        /// The step.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// Enable No Snoop does not stay clear.
    #[error(
        "{0}: its Enable No Snoop bit reads 1 after it was cleared, so its DMA is not coherent; \
         bus master stays off; use --no-snoop=assume to flush instead"
    )]
    NoSnoop(String),
    /// There is no such region, or the access leaves it.
    #[error("region {index}: {count} bytes at {offset:#x}: the region has {size} bytes")]
    Region {
        /// `VFIO_PCI_*_REGION_INDEX`.
        index: u32,
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length of the access, in bytes.
        count: usize,
        /// Size of the region, in bytes.
        size: u64,
    },
    /// There are no such vectors.
    #[error("interrupt {index}: {count} vectors from {start}: there are {available}")]
    Vectors {
        /// `VFIO_PCI_*_IRQ_INDEX`.
        index: u32,
        /// First vector.
        start: u32,
        /// Number of vectors in the request.
        count: u32,
        /// Number of vectors of the interrupt.
        available: u32,
    },
    /// The range is empty, not page-aligned, or wraps around.
    #[error(
        "DMA map at {address:#x} of {size} bytes: empty, not whole pages of 4 KiB, or past the end of the address space"
    )]
    Range {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Something is mapped there already.
    #[error("DMA map {requested}: overlaps {mapped}, which is mapped already")]
    Exists {
        /// The range to map.
        requested: Span<Gpa>,
        /// The mapping that it overlaps.
        mapped: Span<Gpa>,
    },
    /// There is no mapping in that range.
    #[error("DMA unmap at {address:#x} of {size} bytes: nothing is mapped there")]
    NotMapped {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A mapping lies in the range to unmap only in part.
    #[error(
        "DMA unmap {range}: would cut through {mapped}, which can only be unmapped as a whole; nothing is unmapped"
    )]
    Cut {
        /// The range to unmap.
        range: Span<Gpa>,
        /// The mapping that it cuts.
        mapped: Span<Gpa>,
    },
    /// One of the mappings could not be unmapped; those before it have been.
    #[error("DMA unmap {span}: {source}; it stays mapped, and so do {after} mapping(s) after it")]
    StaysMapped {
        /// The mapping.
        span: Span<Gpa>,
        /// Mappings of the same request that have not been tried.
        after: usize,
        /// Why.
        source: MapError,
    },
    /// The limit on DMA maps is reached.
    #[error("at most {0} DMA maps are possible; the virtual machine's memory must be mapped in fewer pieces")]
    TooManyMaps(usize),
    /// The virtual machine's memory is not shared.
    #[error(
        "the virtual machine's memory at {0} comes without a file descriptor, so the device cannot reach it; give QEMU \
         -object memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem"
    )]
    NotShared(Span<Gpa>),
    /// The front-end has a private mapping of the memory it shares.
    #[error(
        "the front-end has mapped the memory at {0} privately, so the guest's writes never reach the device; add share=on \
         to QEMU's memory backend"
    )]
    Private(Span<Gpa>),
    /// The file cannot be mapped as requested.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// The device's address space refused.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl PassthroughError {
    /// Maps the errno of `step` on `function`.
    pub(crate) fn function(function: &(impl Function + ?Sized), step: &'static str) -> impl FnOnce(io::Error) -> Self {
        let name = function.name().to_owned();
        move |source| Self::Function { name, step, source }
    }

    /// The errno for the virtual machine monitor.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let of = |source: &io::Error| source.raw_os_error().unwrap_or(libc::EIO);
        match self {
            Self::Function { source, .. } => of(source),
            Self::NoSnoop(_) => libc::EIO,
            Self::Region { .. } | Self::Vectors { .. } | Self::Range { .. } => libc::EINVAL,
            Self::Exists { .. } => libc::EEXIST,
            Self::NotMapped { .. } => libc::ENOENT,
            Self::Cut { .. } => libc::EINVAL,
            Self::StaysMapped { source, .. } => map_errno(source),
            Self::TooManyMaps(_) => libc::ENOSPC,
            Self::NotShared(_) | Self::Private(_) => libc::EINVAL,
            Self::Memory(RegionError::Kernel { source, .. }) => of(source),
            Self::Memory(_) => libc::EINVAL,
            Self::Map(error) => map_errno(error),
        }
    }
}

fn map_errno(error: &MapError) -> i32 {
    match error {
        MapError::NotAllowed { .. } => libc::EINVAL,
        MapError::Overlap { .. } => libc::EEXIST,
        MapError::NotMapped { .. } => libc::ENOENT,
        MapError::MemLock { .. } | MapError::DeviceMustBeIdle { .. } | MapError::NoIova(_) => libc::ENOMEM,
        MapError::Kernel { source, .. } | MapError::Allocate { source, .. } => {
            source.raw_os_error().unwrap_or(libc::EIO)
        }
    }
}
