//! One region of guest memory: a span of a file that the front-end shared, mapped into this process.
//!
//! The front-end is believed in nothing. What it announces is compared with what the file is before a byte of it is
//! touched: a region past the end of its file would kill this process with SIGBUS at the first access, not at `mmap`.

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

/// The smallest page of every IOMMU, bytes.
const IOMMU_PAGE: u64 = 4096;

/// Which file, whatever its descriptor number: QEMU sends the same memfd under several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Which file `file` is.
    ///
    /// # Errors
    /// The errno of `fstat`.
    pub fn of(file: &File) -> io::Result<Self> {
        let stat = fstat(file)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }

    /// The inode number, as `/proc/PID/maps` shows it.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

/// As `/proc/PID/maps` shows it: `00:01 1034`.
impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        write!(f, "{major:02x}:{minor:02x} {}", self.inode)
    }
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
///
/// A region that ends within a page is served to the end of that page: pages are all that an IOMMU can map, and the rest of
/// the page comes from the same file. (libblkio shares buffers of any size; QEMU's are always whole pages.)
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
        /// Start, raw, of whichever address wrapped.
        start: u64,
        /// Length, bytes.
        len: u64,
    },
    /// The file holds no memory that could be shared.
    #[error("memory region {gpa}: its file descriptor is a {found}, not a file in memory (memfd, tmpfs, hugetlbfs)")]
    NotMemory {
        /// The guest range.
        gpa: Span<Gpa>,
        /// What it is.
        found: String,
    },
    /// The range or the file offset does not start on a page boundary of the memory behind it.
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
        Self::map_as(spec, true, None)
    }

    /// The same for a piece of a file that need not begin or end with one of its pages, but with one of the IOMMU's (4 KiB):
    /// a virtual machine maps its memory around holes that are smaller than huge pages. The device may only read it unless
    /// `writable`.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map_piece(spec: RegionSpec, writable: bool) -> Result<Self, RegionError> {
        Self::map_as(spec, writable, Some(IOMMU_PAGE))
    }

    fn map_as(spec: RegionSpec, writable: bool, unit: Option<u64>) -> Result<Self, RegionError> {
        let announced = spec.gpa;
        let kernel = |what| move |source: io::Error| RegionError::Kernel { gpa: announced, what, source };
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

    /// True if `spec` is this very memory at the same addresses.
    pub(super) fn is_mapping_of(&self, spec: &RegionSpec) -> bool {
        // The file last: asking for its identity is a system call, and most regions differ in their addresses.
        let same_place = self.is_announced_as(spec.gpa, spec.qva) && spec.offset == self.offset;
        same_place && FileId::of(&spec.file).is_ok_and(|id| id == self.id)
    }

    /// True if the front-end announced this region at these addresses and of this size.
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

    /// True if the kernel can pin the file itself (memfd, tmpfs, hugetlbfs, and all of the last page inside the file), so
    /// that no virtual address is needed.
    #[must_use]
    pub fn pinnable(&self) -> bool {
        self.pinnable
    }

    /// True if the front-end sealed the file against shrinking; else it could be truncated under us.
    #[must_use]
    pub fn sealed_against_shrinking(&self) -> bool {
        fcntl_get_seals(&*self.file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    /// True if the device may write it.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// This process's view.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.shared
    }
}

/// What the kernel says about the file behind a region.
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

    /// The whole pages, of `unit` bytes, that `spec` covers, if the file has them.
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

/// Maps `len` bytes of a file, and around them what it takes to begin and end with its pages.
fn map_file(spec: &RegionSpec, len: usize, page_size: u64) -> io::Result<SharedMemory> {
    let page = usize::try_from(page_size).map_err(io::Error::other)?;
    let start = spec.offset - spec.offset % page_size;
    let skip = usize::try_from(spec.offset - start).map_err(io::Error::other)?;
    let whole = (skip + len).checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
    // The last page of a file may be shorter than a page; more than that is never mapped.
    let mapping = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&spec.file), start), whole);
    let shared = SharedMemory::of_truncatable(mapping.map_err(mmap_errno)?, page);
    Ok(shared.slice(skip, len).expect("inside what was mapped"))
}

/// The errno inside the error of the mapping crate, which its text would hide.
fn mmap_errno(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}
