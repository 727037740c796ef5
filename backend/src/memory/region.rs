//! A region of guest memory: part of a file that the front-end has shared, mapped into this process.
//!
//! The front-end is not trusted. An announced region is checked against its file before the memory is accessed: `mmap`
//! accepts a region past the end of the file, and the first access would raise SIGBUS.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

use super::error::RegionError;
use super::file::{Backing, FileId};
use super::page::HostPage;
use crate::addr::{Address, Gpa, Iova, IovaSlice, Qva, Span};
use crate::sys::SharedMemory;

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

impl RegionSpec {
    /// Replaces the descriptor by that of one of `regions` which has the same file and allows as much: the front-end sends
    /// one for each of its maps, and this process has room for a limited number.
    ///
    /// # Errors
    /// As [`Region::map`]: the file is not in memory.
    pub fn share_file<'r>(&mut self, mut regions: impl Iterator<Item = &'r Arc<Region>>) -> Result<(), RegionError> {
        let (id, access) = (FileId::of(&self.file, self.gpa)?, access_mode(&self.file));
        let same = |region: &&Arc<Region>| region.id == id && access_mode(&region.file) == access;
        if let Some(region) = regions.find(same) {
            self.file = Arc::clone(&region.file);
        }
        Ok(())
    }
}

/// Whether the descriptor allows to read, to write, or both (`O_ACCMODE`).
fn access_mode(file: &File) -> Option<OFlags> {
    fcntl_getfl(file).ok().map(|flags| flags & OFlags::RWMODE)
}

/// In what units a region may be mapped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    /// The file's pages, which may be huge.
    PageOfFile,
    /// The host's pages.
    PageOfHost,
}

/// A validated and mapped region.
///
/// A region that ends inside a page is extended to the end of the page, because an IOMMU maps whole pages. The rest of the
/// page belongs to the same file. (libblkio shares buffers of any size; QEMU's regions are always whole pages.)
pub struct Region {
    gpa: Span<Gpa>,
    iova: Span<Iova>,
    slice: IovaSlice,
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

impl Region {
    /// Validates `spec` against its file and maps it (`MAP_SHARED`, readable and writable). For the device it is at IOVA = GPA.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map(spec: RegionSpec) -> Result<Self, RegionError> {
        Self::map_in(spec, IovaSlice::WHOLE)
    }

    /// As [`Self::map`], of a guest that has `slice` of the device's address space.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map_in(spec: RegionSpec, slice: IovaSlice) -> Result<Self, RegionError> {
        Self::map_as(spec, slice, true, Unit::PageOfFile, HostPage::of_system())
    }

    /// Like [`Self::map`], but needs only the alignment of a page of this host, not that of the file's pages: a virtual machine
    /// maps its memory around holes that are smaller than a huge page. The device may write the memory only if `writable`.
    ///
    /// # Errors
    /// See [`RegionError`]; nothing stays mapped.
    pub fn map_piece(spec: RegionSpec, writable: bool) -> Result<Self, RegionError> {
        Self::map_as(spec, IovaSlice::WHOLE, writable, Unit::PageOfHost, HostPage::of_system())
    }

    /// As on a host with pages of `host`, which may be any multiple of this one's.
    pub(super) fn map_as(
        spec: RegionSpec,
        slice: IovaSlice,
        writable: bool,
        unit: Unit,
        host: HostPage,
    ) -> Result<Self, RegionError> {
        let announced = spec.gpa;
        let kernel = |call| move |source: io::Error| RegionError::Kernel { gpa: announced, call, source };
        let backing = Backing::of(&spec.file, announced, host)?;
        let unit = match unit {
            Unit::PageOfFile => backing.page_size,
            Unit::PageOfHost => host.bytes(),
        };
        let gpa = check(&spec, &backing, unit)?;
        let iova = slice.place(gpa).ok_or(RegionError::Slice { gpa, size: slice.size() })?;
        let range = |start: u64| RegionError::Range { start, len: gpa.len() };
        let qva = Span::new(spec.qva, announced.len()).ok_or(range(spec.qva.raw()))?;
        let len = usize::try_from(gpa.len()).map_err(|_| range(gpa.start().raw()))?;
        let (mapping, skip) = map_file(&spec, len, backing.page_size, writable).map_err(kernel("mmap"))?;
        let page = usize::try_from(backing.page_size).expect("mapped");
        let shared = SharedMemory::of_truncatable(mapping, page).map_err(kernel("watch it for SIGBUS"))?;
        let shared = shared.slice(skip, len).expect("inside the mapping");
        Ok(Self {
            gpa,
            iova,
            slice,
            announced: announced.len(),
            qva,
            offset: spec.offset,
            file: spec.file,
            id: backing.id,
            page_size: backing.page_size,
            writable,
            pinnable: spec.offset + gpa.len() <= backing.size,
            shared,
        })
    }

    /// True if `spec` describes the same memory at the same addresses.
    pub(super) fn is_mapping_of(&self, spec: &RegionSpec) -> bool {
        // The file is compared last: its identity costs a system call, and most regions already differ in their addresses.
        let same_range = self.is_announced_as(spec.gpa, spec.qva) && spec.offset == self.offset;
        same_range && FileId::of(&spec.file, spec.gpa).is_ok_and(|id| id == self.id)
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

    /// The device's address range.
    #[inline]
    #[must_use]
    pub fn iova(&self) -> Span<Iova> {
        self.iova
    }

    /// The part of the device's address space that the guest has.
    #[inline]
    #[must_use]
    pub fn slice(&self) -> IovaSlice {
        self.slice
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

    /// True if the kernel can pin the file itself (`IOMMU_IOAS_MAP_FILE`) instead of a virtual address range. The file must
    /// contain the whole last page.
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

    /// This process's mapping. Unless the region is [`Self::writable`], a write kills this process.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.shared
    }
}

/// Checks `spec` against its file, and rounds its range up to whole pages of `unit` bytes.
fn check(spec: &RegionSpec, backing: &Backing, unit: u64) -> Result<Span<Gpa>, RegionError> {
    let gpa = spec.gpa;
    if !gpa.start().is_aligned(unit) || !spec.offset.is_multiple_of(unit) {
        return Err(RegionError::Alignment { gpa, offset: spec.offset, page_size: unit });
    }
    let needed = spec.offset.checked_add(gpa.len()).ok_or(RegionError::Range { start: spec.offset, len: gpa.len() })?;
    if needed > backing.size {
        return Err(RegionError::PastEnd { gpa, needed, found: backing.size });
    }
    let pages = gpa.len().checked_next_multiple_of(unit);
    let rounded = pages.filter(|pages| spec.offset.checked_add(*pages).is_some());
    rounded
        .and_then(|pages| Span::new(gpa.start(), pages))
        .ok_or(RegionError::Range { start: gpa.start().raw(), len: gpa.len() })
}

/// Maps `len` bytes of a file. The mapping is extended to page boundaries on both sides; returns how many bytes before. It is
/// readable only if the device may not write the memory, whose file may be open for reading only (a ROM).
fn map_file(spec: &RegionSpec, len: usize, page_size: u64, writable: bool) -> io::Result<(MmapRegion<()>, usize)> {
    let page = usize::try_from(page_size).map_err(io::Error::other)?;
    let start = spec.offset - spec.offset % page_size;
    let skip = usize::try_from(spec.offset - start).map_err(io::Error::other)?;
    let rounded = (skip + len).checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
    // The file may end inside the last page, but never before it.
    let file = FileOffset::from_arc(Arc::clone(&spec.file), start);
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    let mapping = MmapRegion::build(Some(file), rounded, protection, libc::MAP_NORESERVE | libc::MAP_SHARED);
    Ok((mapping.map_err(mmap_errno)?, skip))
}

/// The errno inside an error of `vm-memory`, whose own text hides it.
pub(super) fn mmap_errno(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    }
}
