//! The address space of a function that uses No Snoop. `iommu::MappedMemory` performs the same steps in the same order as with
//! the kernel's address spaces. Here it works on two in-memory spaces: the software IOMMU, and one that only pins pages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use vm_memory::MmapRegion;

use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError, SecondSpace, SpaceStatistics};
use crate::iommu::{MappedMemory, Piece, Space, Steps, flush};
use crate::memory::Region;
use crate::sys::SharedMemory;

use super::cache::{Cache, StaleLines};
use super::second::StagedSecond;
use super::{SoftIommu, lock};

/// Piece size in bytes. Small, so that small test memory has several pieces.
const CHUNK: u64 = 128 << 10;
const PAGE: usize = 4096;

/// A handle to the address space. Clones refer to the same space.
#[derive(Clone)]
pub(super) struct StagedSpace(Arc<Spaces>);

/// Mappings of one space by start address; true if the function may write.
type Mapped = BTreeMap<Iova, (Span<Iova>, SharedMemory, bool)>;

struct Spaces {
    iommu: SoftIommu,
    cache: Arc<Cache>,
    /// Mappings of both spaces. Memory that is in either of them is pinned.
    pinned: Mutex<[Mapped; 2]>,
    mapped: MappedMemory,
    faults: SpaceFaults,
    /// The driver's buffers, and the second address space, which has them as well. The lock is held while either changes.
    shared: Mutex<Shared>,
}

/// What this address space and the second one share.
#[derive(Default)]
struct Shared {
    buffers: Vec<(Span<Iova>, SharedMemory)>,
    second: Weak<Spaces>,
}

/// Faults of the kernel's address spaces, and the function's last write. May be set at any time.
#[derive(Debug, Default)]
pub struct SpaceFaults {
    /// The n-th copy from one space to the other, counted from now, fails with ENOMEM. 0 means no failure.
    pub fail_nth_copy: AtomicU32,
    /// The n-th copy, and all after it, fail with ENOMEM. 0 means no failure.
    pub fail_copies_from: AtomicU32,
    /// Mapping in a space without an attached device fails with ENODEV, as with Arm's SMMUv2.
    pub map_needs_attach: AtomicBool,
    /// The front-end truncates this file as soon as a piece of memory is pinned.
    pub truncate_after_pin: Mutex<Option<File>>,
    /// Address at which the function writes the byte [`LAST_WRITE`] just before it is unmapped there or detached.
    pub last_write: Mutex<Option<Iova>>,
}

/// The byte written for [`SpaceFaults::last_write`].
pub const LAST_WRITE: u8 = 0xa5;

impl StagedSpace {
    pub(super) fn new(iommu: SoftIommu, cache: Arc<Cache>) -> Self {
        let (mapped, faults) = (MappedMemory::new(true, CHUNK), SpaceFaults::default());
        let (pinned, shared) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Spaces { iommu, cache, pinned, mapped, faults, shared }))
    }

    pub(super) fn faults(&self) -> &SpaceFaults {
        &self.0.faults
    }

    pub(super) fn stale_lines(&self) -> StaleLines {
        self.0.cache.stale_lines()
    }

    /// Exchanges all mappings with those of `other`. No transfer runs meanwhile.
    pub(super) fn exchange(&self, other: &Self) {
        let (mine, others) = (&*self.0, &*other.0);
        mine.iommu.exchange(&others.iommu);
        std::mem::swap(&mut *lock(&mine.pinned), &mut *lock(&others.pinned));
        mine.mapped.exchange(&others.mapped);
    }

    pub(super) fn order(&self) -> &'static str {
        self.0.mapped.order()
    }
}

impl Spaces {
    /// True if either space maps `span`.
    fn is_pinned(&self, span: Span<Iova>) -> bool {
        lock(&self.pinned).iter().any(|space| space.contains_key(&span.start()))
    }

    /// Maps a buffer that is pinned already.
    fn share(&self, span: Span<Iova>, shared: &SharedMemory) -> Result<(), MapError> {
        let whole = Piece { span, shared, offset: 0, file: None, writable: true };
        for piece in span.chunks(CHUNK).map(|span| whole.part(span)) {
            let part = shared.slice(piece.offset, piece.bytes()).expect("a piece lies in its memory");
            self.iommu.map_as(piece.span, part.clone(), true)?;
            lock(&self.pinned)[Space::Live as usize].insert(piece.span.start(), (piece.span, part, true));
            self.mapped.inherit(piece.span);
        }
        Ok(())
    }

    /// Undoes [`Self::share`].
    fn unshare(&self, span: Span<Iova>) {
        for piece in span.chunks(CHUNK) {
            lock(&self.pinned)[Space::Live as usize].remove(&piece.start());
            self.iommu.unmap(piece).expect("mapped in both");
            self.mapped.forget(piece);
        }
    }

    /// Performs [`SpaceFaults::last_write`] if the function is about to lose access to its address.
    fn write_last_byte(&self, loses_access: impl Fn(Iova) -> bool) {
        if let Some(at) = lock(&self.faults.last_write).take_if(|at| loses_access(*at))
            && let Err(fault) = self.iommu.write(at, &[LAST_WRITE])
        {
            log::error!("emulated function: the last write before losing access failed: {fault:?}");
        }
    }

    fn insert(&self, space: Space, span: Span<Iova>, shared: SharedMemory, writable: bool) -> io::Result<()> {
        if space == Space::Live {
            self.iommu.map_as(span, shared.clone(), writable).map_err(io::Error::other)?;
            self.cache.mapped(&shared, 0, shared.len());
        }
        lock(&self.pinned)[space as usize].insert(span.start(), (span, shared, writable));
        Ok(())
    }
}

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl Steps for Spaces {
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()> {
        if space == Space::Staging && self.faults.map_needs_attach.load(SeqCst) {
            return errno(libc::ENODEV);
        }
        self.cache.pages_migrated(piece.shared, piece.offset, piece.bytes());
        let shared = piece.shared.slice(piece.offset, piece.bytes()).expect("a piece lies in its memory");
        self.insert(space, piece.span, shared, piece.writable)?;
        if let Some(file) = lock(&self.faults.truncate_after_pin).take() {
            file.set_len(0)?;
        }
        Ok(())
    }

    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()> {
        let span = piece.span;
        let count = |left: u32| left.checked_sub(1);
        let once = self.faults.fail_nth_copy.fetch_update(SeqCst, SeqCst, count) == Ok(1);
        let left = |left: u32| (left > 1).then(|| left - 1);
        let all = self.faults.fail_copies_from.fetch_update(SeqCst, SeqCst, left) == Err(1);
        if once || all {
            return errno(libc::ENOMEM);
        }
        let found = lock(&self.pinned)[from as usize].get(&span.start()).cloned();
        let Some((_, shared, _)) = found.filter(|(mapped, ..)| *mapped == span) else { return errno(libc::ENOENT) };
        self.insert(to, span, shared, piece.writable)
    }

    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()> {
        let found = lock(&self.pinned)[space as usize].remove(&span.start());
        let Some((_, shared, _)) = found else { return errno(libc::ENOENT) };
        if space == Space::Live {
            self.write_last_byte(|at| span.contains(at));
            self.iommu.unmap(span).map_err(io::Error::other)?;
        }
        if !self.is_pinned(span) {
            self.cache.unpinned(&shared, 0, shared.len());
        }
        Ok(())
    }

    fn flush(&self, piece: Piece<'_>) {
        flush(&*self.cache, piece.shared, piece.offset, piece.bytes());
    }

    fn detach(&self) -> io::Result<()> {
        self.write_last_byte(|_| true);
        self.iommu.set_detached(true);
        Ok(())
    }

    fn attach(&self) -> io::Result<()> {
        self.iommu.set_detached(false);
        Ok(())
    }
}

fn whole(region: &Region) -> Piece<'_> {
    Piece { span: region.iova(), shared: region.memory(), offset: 0, file: None, writable: region.writable() }
}

impl AddressSpace for StagedSpace {
    fn allowed(&self) -> Result<Vec<Span<Iova>>, MapError> {
        self.0.iommu.allowed()
    }

    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let whole = whole(region);
        self.0.iommu.check(whole.span)?;
        let added = self.0.mapped.add(&*self.0, whole);
        added.map_err(|(span, (step, source))| MapError::Kernel { step, span, source })
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.0.mapped.remove(&*self.0, whole(region))
    }

    fn remove_while_idle(&self, region: &Region) -> Result<(), MapError> {
        self.0.mapped.remove_while_idle(&*self.0, whole(region))
    }

    fn require_flush_before_map(&self) {
        self.0.mapped.require_flush_before_map();
    }

    fn statistics(&self) -> SpaceStatistics {
        self.0.mapped.statistics()
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        Some(Arc::clone(&self.0.cache) as Arc<dyn CacheFlush>)
    }

    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        let mut shared = lock(&self.0.shared);
        if shared.second.strong_count() != 0 {
            return Err(MapError::NoSecondSpace { why: "there is one already".into() });
        }
        let second = Self::new(self.0.iommu.another(), Arc::clone(&self.0.cache));
        for (span, memory) in &shared.buffers {
            second.0.share(*span, memory)?;
        }
        shared.second = Arc::downgrade(&second.0);
        Ok(Arc::new(StagedSecond { first: self.clone(), second }))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let mut state = lock(&self.0.shared);
        let second = state.second.upgrade();
        let len = bytes.max(1).checked_next_multiple_of(PAGE).ok_or(MapError::NoIova(bytes))?;
        let memory = MmapRegion::new(len).map_err(|e| MapError::Allocate { bytes, source: io::Error::other(e) })?;
        let shared = SharedMemory::of(Arc::new(memory));
        let taken = second.as_ref().map(|second| second.iommu.mapped()).unwrap_or_default();
        let span = self.0.iommu.free_span(len as u64, &taken).ok_or(MapError::NoIova(bytes))?;
        let added = self.0.mapped.add(&*self.0, Piece { span, shared: &shared, offset: 0, file: None, writable: true });
        added.map_err(|(span, (step, source))| MapError::Kernel { step, span, source })?;
        second.iter().try_for_each(|second| second.share(span, &shared))?;
        state.buffers.push((span, shared.clone()));
        let mapping = Buffer { space: self.clone(), span, shared: shared.clone() };
        Ok(DmaBuffer::new(shared, span, Box::new(mapping)))
    }
}

/// Removes the mapping when the driver's buffer is dropped.
struct Buffer {
    space: StagedSpace,
    span: Span<Iova>,
    shared: SharedMemory,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let spaces = &*self.space.0;
        let mut shared = lock(&spaces.shared);
        shared.buffers.retain(|(span, _)| *span != self.span);
        if let Some(second) = shared.second.upgrade() {
            second.unshare(self.span);
        }
        let whole = Piece { span: self.span, shared: &self.shared, offset: 0, file: None, writable: true };
        let removed = match spaces.mapped.remove(spaces, whole) {
            Err(MapError::DeviceMustBeIdle { .. }) => spaces.mapped.remove_while_idle(spaces, whole),
            other => other,
        };
        if let Err(error) = removed {
            log::error!("{error}");
        }
    }
}
