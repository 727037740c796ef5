//! The address space of a function that goes behind the caches. It runs the same steps as the kernel's, in the same order
//! (`iommu::Exposure`), on two spaces in memory: the software IOMMU, and a second one that holds pages pinned.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use vm_memory::MmapRegion;

use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError, SpaceStatistics};
use crate::iommu::{Exposure, Piece, Space, Steps, flush};
use crate::memory::Region;
use crate::sys::Window;

use super::cache::{Cache, Disagreements};
use super::{SoftIommu, lock};

/// Pieces are small, so that there are several of them in small memory, bytes.
const CHUNK: u64 = 128 << 10;
const PAGE: usize = 4096;

/// The address space; clones are the same one.
#[derive(Clone)]
pub(super) struct FlushedSpace(Arc<Spaces>);

/// What one space maps, by where it begins, and whether the function may write it.
type Mapped = BTreeMap<Iova, (Span<Iova>, Window, bool)>;

struct Spaces {
    iommu: SoftIommu,
    cache: Arc<Cache>,
    /// What is mapped where, to copy from and to know what is still pinned.
    pinned: Mutex<[Mapped; 2]>,
    exposure: Exposure,
    faults: SpaceFaults,
}

/// What the kernel may refuse and the function may do at the worst moment. Set at any time.
#[derive(Debug, Default)]
pub struct SpaceFaults {
    /// Counts copies from one space to the other down; the one that meets 1 fails with ENOMEM.
    pub no_memory_at: AtomicU32,
    /// Nothing can be mapped in a space that no device is attached to (ENODEV), as with Arm's SMMUv2.
    pub attach_first: AtomicBool,
    /// Where the function writes one byte, [`PARTING`], as the last thing it does before it is cut off from there.
    pub parting_write: Mutex<Option<Iova>>,
}

/// The byte of [`SpaceFaults::parting_write`].
pub const PARTING: u8 = 0xa5;

impl FlushedSpace {
    pub(super) fn new(iommu: SoftIommu, cache: Arc<Cache>) -> Self {
        let (exposure, faults) = (Exposure::new(true, CHUNK), SpaceFaults::default());
        Self(Arc::new(Spaces { iommu, cache, pinned: Mutex::default(), exposure, faults }))
    }

    pub(super) fn faults(&self) -> &SpaceFaults {
        &self.0.faults
    }

    pub(super) fn disagreements(&self) -> Disagreements {
        self.0.cache.disagreements()
    }

    pub(super) fn order(&self) -> &'static str {
        self.0.exposure.order()
    }
}

impl Spaces {
    /// Whether either space maps `span`.
    fn holds(&self, span: Span<Iova>) -> bool {
        lock(&self.pinned).iter().any(|space| space.contains_key(&span.start()))
    }

    /// The function is about to lose what `reach` says; its last chance to write there.
    fn part_from(&self, reach: impl Fn(Iova) -> bool) {
        if let Some(at) = lock(&self.faults.parting_write).take_if(|at| reach(*at))
            && let Err(fault) = self.iommu.write(at, &[PARTING])
        {
            log::error!("emulated function: a write that should have been possible: {fault:?}");
        }
    }

    fn enter(&self, space: Space, span: Span<Iova>, window: Window, writable: bool) -> io::Result<()> {
        if space == Space::Live {
            self.iommu.map_as(span, window.clone(), writable).map_err(io::Error::other)?;
            self.cache.exposed(&window, 0, window.len());
        }
        lock(&self.pinned)[space as usize].insert(span.start(), (span, window, writable));
        Ok(())
    }
}

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl Steps for Spaces {
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()> {
        if space == Space::Staging && self.faults.attach_first.load(SeqCst) {
            return errno(libc::ENODEV);
        }
        self.cache.moved(piece.window, piece.offset, piece.bytes());
        let window = piece.window.slice(piece.offset, piece.bytes()).expect("a piece lies in its window");
        self.enter(space, piece.span, window, piece.writable)
    }

    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()> {
        let span = piece.span;
        let count = |left: u32| left.checked_sub(1);
        if self.faults.no_memory_at.fetch_update(SeqCst, SeqCst, count) == Ok(1) {
            return errno(libc::ENOMEM);
        }
        let found = lock(&self.pinned)[from as usize].get(&span.start()).cloned();
        let Some((_, window, _)) = found.filter(|(mapped, ..)| *mapped == span) else { return errno(libc::ENOENT) };
        self.enter(to, span, window, piece.writable)
    }

    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()> {
        let found = lock(&self.pinned)[space as usize].remove(&span.start());
        let Some((_, window, _)) = found else { return errno(libc::ENOENT) };
        if space == Space::Live {
            self.part_from(|at| span.contains(at));
            self.iommu.unmap(span).map_err(io::Error::other)?;
        }
        if !self.holds(span) {
            self.cache.unpinned(&window, 0, window.len());
        }
        Ok(())
    }

    fn flush(&self, piece: Piece<'_>) {
        flush(&*self.cache, piece.window, piece.offset, piece.bytes());
    }

    fn detach(&self) -> io::Result<()> {
        self.part_from(|_| true);
        self.iommu.set_detached(true);
        Ok(())
    }

    fn attach(&self) -> io::Result<()> {
        self.iommu.set_detached(false);
        Ok(())
    }
}

fn whole(region: &Region) -> Piece<'_> {
    Piece {
        span: region.gpa().identity_iova(),
        window: region.window(),
        offset: 0,
        file: None,
        writable: region.writable(),
    }
}

impl AddressSpace for FlushedSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let whole = whole(region);
        self.0.iommu.check(whole.span)?;
        let added = self.0.exposure.add(&*self.0, whole);
        added.map_err(|(span, (what, source))| MapError::Kernel { what, span, source })
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.0.exposure.remove(&*self.0, whole(region))
    }

    fn remove_at_rest(&self, region: &Region) -> Result<(), MapError> {
        self.0.exposure.remove_at_rest(&*self.0, whole(region))
    }

    fn statistics(&self) -> SpaceStatistics {
        self.0.exposure.statistics()
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        Some(Arc::clone(&self.0.cache) as Arc<dyn CacheFlush>)
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let len = bytes.max(1).checked_next_multiple_of(PAGE).ok_or(MapError::NoIova(bytes))?;
        let memory = MmapRegion::new(len).map_err(|e| MapError::Allocate { bytes, source: io::Error::other(e) })?;
        let window = Window::of(Arc::new(memory));
        let span = self.0.iommu.free_span(len as u64).ok_or(MapError::NoIova(bytes))?;
        let added =
            self.0.exposure.add(&*self.0, Piece { span, window: &window, offset: 0, file: None, writable: true });
        added.map_err(|(span, (what, source))| MapError::Kernel { what, span, source })?;
        let mapping = Buffer { space: self.clone(), span, window: window.clone() };
        Ok(DmaBuffer::new(window, span, Box::new(mapping)))
    }
}

/// Takes the driver's mapping away when its buffer is dropped.
struct Buffer {
    space: FlushedSpace,
    span: Span<Iova>,
    window: Window,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let spaces = &*self.space.0;
        let whole = Piece { span: self.span, window: &self.window, offset: 0, file: None, writable: true };
        let removed = match spaces.exposure.remove(spaces, whole) {
            Err(MapError::DeviceMustRest { .. }) => spaces.exposure.remove_at_rest(spaces, whole),
            other => other,
        };
        if let Err(error) = removed {
            log::error!("{error}");
        }
    }
}
