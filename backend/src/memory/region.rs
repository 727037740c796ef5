//! One region of guest memory: a span of a file that the front-end shared, mapped into this process.
//!
//! The front-end is believed in nothing. What it announces is compared with what the file is before a byte of it is
//! touched: a region past the end of its file would kill this process with SIGBUS at the first access, not at `mmap`.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use vm_memory::{FileOffset, MmapRegion};

use crate::addr::{Address, Bytes, Gpa, Qva, Span};
use crate::sys::Window;

/// `f_type` of a hugetlbfs file (statfs(2)).
const HUGETLBFS_MAGIC: i64 = 0x958458f6;
/// `f_type` of a tmpfs or memfd file (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Which file, whatever its descriptor number: QEMU sends the same memfd under several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

/// A region as the front-end announced it (vhost-user: "Memory region description"), not yet believed.
#[derive(Clone, Debug)]
pub struct RegionSpec {
    /// Guest physical range.
    pub gpa: Span<Gpa>,
    /// Start in the front-end's address space (with `GPA_ADDRESSES`: the guest physical address again).
    pub qva: Qva,
    /// Byte offset in the file.
    pub offset: u64,
    /// The shared file.
    pub file: Arc<File>,
}

/// A validated and mapped region.
pub struct Region {
    gpa: Span<Gpa>,
    qva: Span<Qva>,
    offset: u64,
    file: Arc<File>,
    id: FileId,
    page_size: u64,
    pinnable: bool,
    window: Window,
}

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The range is empty or wraps around.
    #[error("memory region at {start} of {len} bytes: empty, or past the end of the address space")]
    Range {
        /// Start, raw, of whichever address wrapped.
        start: u64,
        /// Length, bytes.
        len: u64,
    },
    /// The range does not start and end on page boundaries of the memory behind it.
    #[error("memory region {gpa} at file offset {offset:#x}: not aligned to its pages of {}", Bytes(*page_size))]
    Alignment {
        /// The guest range.
        gpa: Span<Gpa>,
        /// Offset in the file, bytes.
        offset: u64,
        /// Page size of the memory, bytes.
        page_size: u64,
    },
    /// The file is shorter than the region.
    #[error(
        "memory region {gpa}: needs {needed} bytes of its file, which has {found}; touching the rest would raise SIGBUS"
    )]
    PastEnd {
        /// The guest range.
        gpa: Span<Gpa>,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        found: u64,
    },
    /// Two regions claim the same addresses.
    #[error("memory region {added} overlaps {other}")]
    Overlap {
        /// One.
        added: Span<Gpa>,
        /// The other.
        other: Span<Gpa>,
    },
    /// The kernel would not say what the file is, or would not map it.
    #[error("memory region {gpa}: {what}: {source}")]
    Kernel {
        /// The guest range.
        gpa: Span<Gpa>,
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl RegionError {
    pub(super) fn overlap(one: &Region, other: &Region) -> Self {
        Self::Overlap { added: one.gpa, other: other.gpa }
    }
}

impl Region {
    /// Validates `spec` against its file and maps it, shared, readable and writable.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map(spec: RegionSpec) -> Result<Self, RegionError> {
        let gpa = spec.gpa;
        let kernel = |what| move |source: io::Error| RegionError::Kernel { gpa, what, source };
        let qva = Span::new(spec.qva, gpa.len()).ok_or(RegionError::Range { start: spec.qva.raw(), len: gpa.len() })?;
        let end =
            spec.offset.checked_add(gpa.len()).ok_or(RegionError::Range { start: spec.offset, len: gpa.len() })?;
        let stat = fstat(&*spec.file).map_err(|errno| kernel("fstat")(errno.into()))?;
        let filesystem = fstatfs(&*spec.file).map_err(|errno| kernel("fstatfs")(errno.into()))?;
        let hugetlb = filesystem.f_type == HUGETLBFS_MAGIC;
        let page_size = if hugetlb { filesystem.f_bsize.cast_unsigned() } else { rustix::param::page_size() as u64 };
        let misaligned = |value: u64| !value.is_multiple_of(page_size);
        if misaligned(gpa.start().raw()) || misaligned(gpa.len()) || misaligned(spec.offset) {
            return Err(RegionError::Alignment { gpa, offset: spec.offset, page_size });
        }
        let found = stat.st_size.cast_unsigned();
        if end > found {
            return Err(RegionError::PastEnd { gpa, needed: end, found });
        }
        let len =
            usize::try_from(gpa.len()).map_err(|_| RegionError::Range { start: gpa.start().raw(), len: gpa.len() })?;
        let place = FileOffset::from_arc(Arc::clone(&spec.file), spec.offset);
        let mapping = MmapRegion::from_file(place, len).map_err(|e| kernel("mmap")(io::Error::other(e)))?;
        Ok(Self {
            gpa,
            qva,
            offset: spec.offset,
            file: spec.file,
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            page_size,
            pinnable: hugetlb || filesystem.f_type == TMPFS_MAGIC,
            window: Window::of(Arc::new(mapping)),
        })
    }

    /// True if `spec` is this very memory at the same addresses.
    pub(super) fn serves(&self, spec: &RegionSpec) -> bool {
        let same_file = fstat(&*spec.file).is_ok_and(|s| FileId { device: s.st_dev, inode: s.st_ino } == self.id);
        same_file && spec.gpa == self.gpa && spec.qva == self.qva.start() && spec.offset == self.offset
    }

    /// Guest physical range.
    #[inline]
    #[must_use]
    pub fn gpa(&self) -> Span<Gpa> {
        self.gpa
    }

    /// Front-end virtual range.
    #[must_use]
    pub fn qva(&self) -> Span<Qva> {
        self.qva
    }

    /// The file behind it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where in the file the region starts, bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Which file that is.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Page size of the memory behind it, bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// True if the kernel can pin the file itself (memfd, tmpfs, hugetlbfs), so that no virtual address is needed.
    #[must_use]
    pub fn pinnable(&self) -> bool {
        self.pinnable
    }

    /// True if the front-end sealed the file against shrinking; else it could be truncated under us.
    #[must_use]
    pub fn sealed_against_shrinking(&self) -> bool {
        fcntl_get_seals(&*self.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    /// This process's view.
    #[inline]
    #[must_use]
    pub fn window(&self) -> &Window {
        &self.window
    }
}
