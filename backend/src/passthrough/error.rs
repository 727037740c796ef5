//! Why a request of a virtual machine to its function has failed.

use std::io;

use crate::addr::{Bytes, Gpa, Span};
use crate::coherency::Verdict;
use crate::foreign_fd::NotAnEventfd;
use crate::hardware::{Function, MapError};
use crate::memory::{HostPage, RegionError};
use crate::whole_function::REQUEST_IRQ;

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
    /// The device's own file was handed out, and has not been closed everywhere.
    #[error(
        "{name}: the device's own file, which was given to {}, is still open or mapped: {reason:#}; end every process that has \
         it, or use --bars trapped, which gives it to nobody",
        process(*.given_to)
    )]
    Held {
        /// The function.
        name: String,
        /// The process that was given the file.
        given_to: Option<u32>,
        /// The error of the bind.
        reason: anyhow::Error,
    },
    /// The host has taken the function while it was closed.
    #[error("{name}: the host has taken the device back: {reason:#}")]
    Taken {
        /// The function.
        name: String,
        /// What was found.
        reason: anyhow::Error,
    },
    /// The device's own file was handed out, and the function cannot be acquired anew.
    #[error("{name}: acquire it anew, because its own file was handed out: {reason:#}")]
    Reacquire {
        /// The function.
        name: String,
        /// Why not.
        reason: anyhow::Error,
    },
    /// A reacquired function is not what it was.
    #[error("{name}: its DMA was {was} and would now be {now}; restart this program to serve it")]
    Verdict {
        /// The function.
        name: String,
        /// The verdict at the start.
        was: Verdict,
        /// The verdict now.
        now: Verdict,
    },
    /// Memory of the previous virtual machine is still mapped.
    #[error(
        "{name}: {bytes} bytes of the previous virtual machine's memory are still mapped, because an unmap has failed; restart \
         this program, which unmaps them"
    )]
    StillMapped {
        /// The function.
        name: String,
        /// Bytes.
        bytes: u64,
    },
    /// Enable No Snoop does not stay clear.
    #[error(
        "{0}: its Enable No Snoop bit reads 1 after it was cleared, so its DMA is not coherent; \
         bus master stays off; use --no-snoop=assume to flush instead"
    )]
    NoSnoop(String),
    /// Enable No Snoop must stay clear, and configuration space has no such bit.
    #[error(
        "{0}: its Enable No Snoop bit must stay clear, but its configuration space has no PCI Express capability now; reset \
         the function, or use --no-snoop=assume to flush instead"
    )]
    NoDeviceControl(String),
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
    /// A descriptor for a vector is not an eventfd.
    #[error("interrupt {index}, vector {vector}: {source}")]
    Eventfd {
        /// `VFIO_PCI_*_IRQ_INDEX`.
        index: u32,
        /// The vector.
        vector: u32,
        /// What it is.
        source: NotAnEventfd,
    },
    /// The host does not have that many vectors.
    #[error(
        "interrupt {index}: the host has too few free vectors for {count} of this function; let the guest's driver use \
         fewer queues"
    )]
    NoVectors {
        /// `VFIO_PCI_*_IRQ_INDEX`.
        index: u32,
        /// Number of vectors that the function was to have.
        count: u32,
    },
    /// A command for the request interrupt that is neither to set nor to remove its eventfd.
    #[error(
        "interrupt {REQUEST_IRQ} (REQ): an eventfd can be set or removed, and nothing else; only the host triggers it"
    )]
    Request,
    /// The range is empty, not page-aligned, or wraps around.
    #[error(
        "DMA map at {address:#x} of {size} bytes: empty, not whole pages of {} as this host has them, or past the end of the \
         address space",
        Bytes(page.bytes())
    )]
    Range {
        /// I/O virtual address.
        address: u64,
        /// Bytes.
        size: u64,
        /// The unit.
        page: HostPage,
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
            Self::NoSnoop(_) | Self::NoDeviceControl(_) => libc::EIO,
            Self::Held { .. } | Self::StillMapped { .. } => libc::EBUSY,
            Self::Taken { .. } => libc::ENODEV,
            Self::Verdict { .. } => libc::EPERM,
            Self::Reacquire { reason, .. } => {
                reason.chain().find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error()).unwrap_or(libc::EIO)
            }
            Self::Region { .. } | Self::Vectors { .. } | Self::Range { .. } => libc::EINVAL,
            Self::Eventfd { .. } => libc::EINVAL,
            Self::NoVectors { .. } => libc::ENOSPC,
            Self::Request => libc::EINVAL,
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

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(|| "a process that is not visible from here".into(), |pid| format!("process {pid}"))
}

fn map_errno(error: &MapError) -> i32 {
    match error {
        MapError::NotAllowed { .. } => libc::EINVAL,
        MapError::Overlap { .. } => libc::EEXIST,
        MapError::NotMapped { .. } => libc::ENOENT,
        MapError::HandOver { .. } => libc::EBUSY,
        MapError::NoSecondSpace { .. } => libc::EOPNOTSUPP,
        MapError::TooManyMappings { .. } => libc::ENOSPC,
        MapError::MemLock { .. } | MapError::DeviceMustBeIdle { .. } | MapError::NoIova(_) => libc::ENOMEM,
        MapError::Kernel { source, .. } | MapError::Allocate { source, .. } | MapError::Exchange(source) => {
            source.raw_os_error().unwrap_or(libc::EIO)
        }
    }
}
