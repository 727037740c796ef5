//! Why guest memory was refused.

use std::io;

use crate::addr::{Bytes, Gpa, Span};

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The range is empty or wraps around.
    #[error("memory region at {start} of {len} bytes: empty, or past the end of the address space")]
    Range {
        /// Start of the range that wrapped: guest address, front-end address or file offset.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The descriptor is not a file whose memory can be shared.
    #[error(
        "memory region {gpa}: its file descriptor is of {found}, not of a file in memory (memfd, tmpfs, hugetlbfs)"
    )]
    NotMemory {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// The name of what was found.
        found: String,
    },
    /// The guest address or the file offset is not page-aligned.
    #[error(
        "memory region {gpa} at file offset {offset:#x}: not aligned to its page size of {}, in which this host's kernel maps \
         it; give the guest memory that starts and ends at multiples of that, or smaller pages",
        Bytes(*page_size)
    )]
    Alignment {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Page size of the memory, in bytes.
        page_size: u64,
    },
    /// The file is shorter than the region.
    #[error(
        "memory region {gpa}: needs {needed} bytes of its file, which has {found}; accessing the rest would raise SIGBUS"
    )]
    PastEnd {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// File size needed, in bytes.
        needed: u64,
        /// File size found, in bytes.
        found: u64,
    },
    /// The region does not fit the part of the device's address space that its guest has.
    #[error(
        "memory region {gpa} ends above the first {} of guest addresses, and this socket has no more of the IOMMU's address \
         space, which the namespaces of one process share; give the guest less memory, serve fewer namespaces in one process, or \
         use a machine whose IOMMU has more address bits", Bytes(*size)
    )]
    Slice {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// Bytes that the guest has.
        size: u64,
    },
    /// Two regions overlap.
    #[error("memory region {added} overlaps {other}")]
    Overlap {
        /// One region.
        added: Span<Gpa>,
        /// The other region.
        other: Span<Gpa>,
    },
    /// A system call on the file failed.
    #[error("memory region {gpa}: {call}: {source}")]
    Kernel {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// The system call that failed.
        call: &'static str,
        /// The errno.
        source: io::Error,
    },
}
