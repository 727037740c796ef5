//! A region of guest memory: part of a file that the front-end has shared, mapped into this process.
//!
//! The front-end is not trusted. An announced region is checked against its file before the memory is accessed: `mmap`
//! accepts a region past the end of the file, and the first access would raise SIGBUS.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatfs};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use crate::addr::{Address, Bytes, Gpa, Qva, Span};
use crate::sys::SharedMemory;

/// `f_type` of a hugetlbfs file (statfs(2)).
const HUGETLBFS_MAGIC: i64 = 0x958458f6;
/// `f_type` of a tmpfs or memfd file (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Smallest page size of every IOMMU, in bytes.
const IOMMU_PAGE: u64 = 4096;

/// Identity of a file. The descriptor number is no identity: QEMU sends the same memfd under several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of `file`.
    ///
    /// # Errors
    /// The errno of `fstat`.
    pub fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }

    /// The inode number, as in `/proc/PID/maps`.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

/// Device and inode as in `/proc/PID/maps`: `00:01 1034`.
impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        write!(f, "{major:02x}:{minor:02x} {}", self.inode)
    }
}

/// A region as announced by the front-end (vhost-user: "Memory region description"), not yet validated.
#[derive(Clone, Debug)]
pub struct RegionSpec {
    /// Guest physical range.
    pub gpa: Span<Gpa>,
    /// Front-end virtual address (with `GPA_ADDRESSES`: the guest physical address again).
    pub qva: Qva,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// The shared file.
    pub file: Arc<File>,
}

/// A validated and mapped region.
///
/// A region that ends inside a page is extended to the end of the page, because an IOMMU maps whole pages. The rest of the
/// page belongs to the same file. (libblkio shares buffers of any size; QEMU's regions are always whole pages.)
pub struct Region {
    gpa: Span<Gpa>,
    announced: u64,
    qva: Span<Qva>,
    offset: u64,
    file: Arc<File>,
    id: FileId,
    page_size: u64,
    pinnable: bool,
    writable: bool,
    shared: SharedMemory,
}

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
    #[error("memory region {gpa}: its file descriptor is a {found}, not a file in memory (memfd, tmpfs, hugetlbfs)")]
    NotMemory {
        /// Guest physical range.
        gpa: Span<Gpa>,
        /// The file type found.
        found: String,
    },
    /// The guest address or the file offset is not page-aligned.
    #[error("memory region {gpa} at file offset {offset:#x}: not aligned to its page size of {}", Bytes(*page_size))]
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

impl RegionError {
    pub(super) fn overlap(one: &Region, other: &Region) -> Self {
        Self::Overlap { added: one.gpa, other: other.gpa }
    }
}

impl Region {
    /// Validates `spec` against its file and maps it (`MAP_SHARED`, readable and writable).
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map(spec: RegionSpec) -> Result<Self, RegionError> {
        Self::map_as(spec, true, None)
    }

    /// Like [`Self::map`], but needs only the alignment of an IOMMU page (4 KiB), not that of the file's pages: a virtual
    /// machine maps its memory around holes that are smaller than a huge page. The device may write the memory only if
    /// `writable`.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map_piece(spec: RegionSpec, writable: bool) -> Result<Self, RegionError> {
        Self::map_as(spec, writable, Some(IOMMU_PAGE))
    }

    fn map_as(spec: RegionSpec, writable: bool, unit: Option<u64>) -> Result<Self, RegionError> {
        let announced = spec.gpa;
        let kernel = |call| move |source: io::Error| RegionError::Kernel { gpa: announced, call, source };
        let backing = Backing::of(&spec.file).map_err(kernel("fstat"))?;
        let gpa = backing.check(&spec, unit.unwrap_or(backing.page_size))?;
        let range = |start: u64| RegionError::Range { start, len: gpa.len() };
        let qva = Span::new(spec.qva, announced.len()).ok_or(range(spec.qva.raw()))?;
        let len = usize::try_from(gpa.len()).map_err(|_| range(gpa.start().raw()))?;
        let shared = map_file(&spec, len, backing.page_size).map_err(kernel("mmap"))?;
        Ok(Self {
            gpa,
            announced: announced.len(),
            qva,
            offset: spec.offset,
            file: spec.file,
            id: backing.id,
            page_size: backing.page_size,
            writable,
            pinnable: backing.in_memory && spec.offset + gpa.len() <= backing.size,
            shared,
        })
    }

    /// True if `spec` describes the same memory at the same addresses.
    pub(super) fn is_mapping_of(&self, spec: &RegionSpec) -> bool {
        // The file is compared last: its identity costs a system call, and most regions already differ in their addresses.
        let same_range = self.is_announced_as(spec.gpa, spec.qva) && spec.offset == self.offset;
        same_range && FileId::of(&spec.file).is_ok_and(|id| id == self.id)
    }

    /// True if the front-end announced this region with these addresses and this size.
    pub(super) fn is_announced_as(&self, gpa: Span<Gpa>, qva: Qva) -> bool {
        self.gpa.start() == gpa.start() && self.announced == gpa.len() && self.qva.start() == qva
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

    /// Offset of the region in its file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Identity of the file.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Page size of the memory behind it, in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// True if the kernel can pin the file itself (`IOMMU_IOAS_MAP_FILE`) instead of a virtual address range. The file must be
    /// a memfd or on tmpfs or hugetlbfs, and must contain the whole last page.
    #[must_use]
    pub fn pinnable(&self) -> bool {
        self.pinnable
    }

    /// True if the front-end sealed the file against shrinking (`F_SEAL_SHRINK`). Otherwise it may truncate the file later.
    #[must_use]
    pub fn sealed_against_shrinking(&self) -> bool {
        fcntl_get_seals(&*self.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    /// True if the device may write the memory.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// This process's mapping.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.shared
    }
}

/// Properties of the file behind a region, from `fstat` and `fstatfs`.
struct Backing {
    id: FileId,
    kind: FileType,
    size: u64,
    page_size: u64,
    in_memory: bool,
}

impl Backing {
    fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        let filesystem = fstatfs(file)?;
        let hugetlb = filesystem.f_type == HUGETLBFS_MAGIC;
        Ok(Self {
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            kind: FileType::from_raw_mode(stat.st_mode),
            size: stat.st_size.cast_unsigned(),
            page_size: if hugetlb { filesystem.f_bsize.cast_unsigned() } else { rustix::param::page_size() as u64 },
            in_memory: hugetlb || filesystem.f_type == TMPFS_MAGIC,
        })
    }

    /// Checks `spec` against the file, and rounds its range up to whole pages of `unit` bytes.
    fn check(&self, spec: &RegionSpec, unit: u64) -> Result<Span<Gpa>, RegionError> {
        let gpa = spec.gpa;
        if self.kind != FileType::RegularFile {
            return Err(RegionError::NotMemory { gpa, found: format!("{:?}", self.kind) });
        }
        if !gpa.start().is_aligned(unit) || !spec.offset.is_multiple_of(unit) {
            return Err(RegionError::Alignment { gpa, offset: spec.offset, page_size: unit });
        }
        let needed =
            spec.offset.checked_add(gpa.len()).ok_or(RegionError::Range { start: spec.offset, len: gpa.len() })?;
        if needed > self.size {
            return Err(RegionError::PastEnd { gpa, needed, found: self.size });
        }
        let pages = gpa.len().checked_next_multiple_of(unit);
        let rounded = pages.filter(|pages| spec.offset.checked_add(*pages).is_some());
        rounded
            .and_then(|pages| Span::new(gpa.start(), pages))
            .ok_or(RegionError::Range { start: gpa.start().raw(), len: gpa.len() })
    }
}

/// Maps `len` bytes of a file. The mapping is extended to page boundaries on both sides.
fn map_file(spec: &RegionSpec, len: usize, page_size: u64) -> io::Result<SharedMemory> {
    let page = usize::try_from(page_size).map_err(io::Error::other)?;
    let start = spec.offset - spec.offset % page_size;
    let skip = usize::try_from(spec.offset - start).map_err(io::Error::other)?;
    let rounded = (skip + len).checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
    // The file may end inside the last page, but never before it.
    let mapping = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&spec.file), start), rounded);
    let shared = SharedMemory::of_truncatable(mapping.map_err(mmap_errno)?, page)?;
    Ok(shared.slice(skip, len).expect("inside the mapping"))
}

/// The errno inside an error of `vm-memory`, whose own text hides it.
fn mmap_errno(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}
