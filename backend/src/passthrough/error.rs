//! Why something that a virtual machine asked of a function was not done.

use std::io;

use crate::addr::{Gpa, Span};
use crate::hardware::{Function, MapError};
use crate::memory::RegionError;

/// See the top of this file. Each has an errno, which is all that the protocol carries.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// A step on the function failed.
    #[error("{name}: {what}: {source}")]
    Function {
        /// The function.
        name: String,
        /// The step.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The function sets Enable No Snoop again by itself.
    #[error(
        "{0}: its Enable No Snoop bit reads 1 after it was cleared, so its DMA is not coherent; \
         it gets no bus master; --no-snoop=assume flushes instead"
    )]
    NoSnoop(String),
    /// There is no such region, or the access leaves it.
    #[error("region {index}: {count} bytes at {offset:#x}: the region has {size} bytes")]
    Region {
        /// `VFIO_PCI_*_REGION_INDEX`.
        index: u32,
        /// Bytes from its start.
        offset: u64,
        /// Bytes.
        count: usize,
        /// Bytes that there are.
        size: u64,
    },
    /// There are no such vectors.
    #[error("interrupt {index}: vectors {start} to {start} + {count}: there are {available}")]
    Vectors {
        /// `VFIO_PCI_*_IRQ_INDEX`.
        index: u32,
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
        /// How many there are.
        available: u32,
    },
    /// The range is empty or wraps around.
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
    #[error("DMA map {wanted}: overlaps {mapped}, which is mapped already")]
    Exists {
        /// Asked for.
        wanted: Span<Gpa>,
        /// In the way.
        mapped: Span<Gpa>,
    },
    /// Nothing was mapped at just that address and of that size.
    #[error("DMA unmap at {address:#x} of {size} bytes: no such mapping")]
    NotMapped {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// The virtual machine has as much mapped as it may.
    #[error("{0} DMA maps are the most; more virtual machine memory must come in fewer pieces")]
    TooManyMaps(usize),
    /// The virtual machine's memory is not shared.
    #[error(
        "the virtual machine's memory at {0} comes without a file descriptor, so the device cannot reach it; give QEMU \
         -object memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem"
    )]
    NotShared(Span<Gpa>),
    /// The front-end sees other pages than it shares.
    #[error(
        "the front-end has mapped the memory at {0} privately; what the guest writes never gets there; add share=on to \
         QEMU's memory backend"
    )]
    Private(Span<Gpa>),
    /// The memory is not what was announced.
    #[error(transparent)]
    Memory(#[from] RegionError),
    /// The device's address space refused.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl PassthroughError {
    /// For a step `what` on `function`.
    pub(crate) fn function(function: &(impl Function + ?Sized), what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let name = function.name().to_owned();
        move |source| Self::Function { name, what, source }
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
