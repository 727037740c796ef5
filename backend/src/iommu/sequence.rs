//! How one piece of memory becomes reachable for the device and how it stops being so.
//!
//! The kernel's map pins and makes reachable in one step, its unmap takes away and unpins in one step, and pinning may move
//! the pages. A flush is worth something only between the two halves, so where DMA goes behind the CPU caches a second,
//! never-attached address space holds the pages meanwhile:
//!
//! ```text
//! (S: staging, V: live)
//! coherent   expose    MAP(V)
//!            withdraw  UNMAP(V)
//! staged     expose    MAP(S) pins ── flush ── COPY(S→V) reachable ── UNMAP(S)
//!            withdraw  COPY(V→S) ── UNMAP(V) unreachable, still pinned ── flush ── UNMAP(S) unpins
//!            at rest   DETACH ── flush ── UNMAP(V) ── ATTACH      when there is no memory for COPY(V→S)
//! gated      expose    MAP(V) ── flush                            when nothing can be mapped before an attach (ENODEV)
//!            withdraw  flush ── UNMAP(V)
//! ```
//!
//! Detaching stops all DMA of the device, so "at rest" is for a device that has nothing in flight. "Gated" rests on the
//! engine: it names memory to the device only after it has been exposed, and withdraws it when no request touches it any
//! more. Where the guest drives the device nobody does that, so there the map fails instead. Each step that fails undoes
//! those before it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::addr::{Address, Iova, Span};
use crate::hardware::SpaceStatistics;
use crate::sys::SharedMemory;

/// One of the two address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The one the device is attached to.
    Live,
    /// The one it is never attached to: what is mapped there is pinned and cannot be reached.
    Staging,
}

/// One piece of memory: where the device will find it, and this process's view of the same bytes.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// For the device.
    pub span: Span<Iova>,
    /// For this process.
    pub shared: &'a SharedMemory,
    /// Where in the window it begins, bytes.
    pub offset: usize,
    /// The file behind it and where in the file it begins, if it is to be pinned by file.
    pub file: Option<(BorrowedFd<'a>, u64)>,
    /// The device may write it.
    pub writable: bool,
}

impl Piece<'_> {
    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::try_from(self.span.len()).expect("a mapped piece fits the address space")
    }

    /// `span`, which lies inside.
    #[must_use]
    pub fn part(&self, span: Span<Iova>) -> Self {
        let inside = span.start().raw() - self.span.start().raw();
        let offset = self.offset + usize::try_from(inside).expect("a mapped piece fits the address space");
        Self { span, offset, file: self.file.map(|(file, at)| (file, at + inside)), ..*self }
    }
}

/// The steps, each one call of the kernel or one flush. Every error is an errno.
pub trait Steps {
    /// Pins `piece` and maps it in `space`.
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()>;
    /// Maps in `to` what `from` has of `piece`, sharing the pin.
    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()>;
    /// Takes a mapping away, and unpins unless the other space has it.
    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()>;
    /// Writes back and invalidates every cache line of `piece`.
    fn flush(&self, piece: Piece<'_>);
    /// Blocks all DMA of the device; what is mapped stays pinned.
    fn detach(&self) -> io::Result<()>;
    /// Undoes [`Steps::detach`].
    fn attach(&self) -> io::Result<()>;
}

/// The step that an IOMMU driver does not know which maps nothing before a device is attached.
const MAPS_ATTACHED_ONLY: &str =
    "flush, before the device can reach it, on an IOMMU that maps only for attached devices";

/// A step's name and the errno it failed with.
pub(super) type Failed = (&'static str, io::Error);

/// Which of the three regimes a device is under, and what following it has cost.
pub(super) struct Sequence {
    flushing: bool,
    flush_after_map: AtomicBool,
    /// Nobody keeps the device from memory that is mapped and not flushed yet.
    flush_before_map: AtomicBool,
    staged: AtomicU64,
    map_bytes: AtomicU64,
    unmap_bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Sequence {
    /// For a device whose DMA is coherent, or (`flushing`) one whose DMA may go behind the caches.
    #[must_use]
    pub(super) fn new(flushing: bool) -> Self {
        let zero = || AtomicU64::new(0);
        let (staged, map_bytes, unmap_bytes, nanoseconds) = (zero(), zero(), zero(), zero());
        let no = || AtomicBool::new(false);
        let (flush_after_map, flush_before_map) = (no(), no());
        Self { flushing, flush_after_map, flush_before_map, staged, map_bytes, unmap_bytes, nanoseconds }
    }

    /// See [`AddressSpace::require_flush_before_map`](crate::hardware::AddressSpace::require_flush_before_map).
    pub(super) fn require_flush_before_map(&self) {
        self.flush_before_map.store(true, Relaxed);
    }

    /// Makes `piece` reachable.
    ///
    /// # Errors
    /// The step that failed; nothing is mapped then.
    pub(super) fn map(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        if !self.flushing {
            return steps.map(Space::Live, piece).map_err(|e| ("pin and map for DMA", e));
        }
        if !self.flush_after_map.load(Relaxed) {
            match self.map_staged(steps, piece) {
                Err((_, error)) if error.raw_os_error() == Some(libc::ENODEV) => {
                    if self.flush_before_map.load(Relaxed) {
                        return Err((MAPS_ATTACHED_ONLY, error));
                    }
                    self.switch_to_flush_after_map();
                }
                other => return other,
            }
        }
        steps.map(Space::Live, piece).map_err(|e| ("pin and map for DMA", e))?;
        self.flush(steps, &self.map_bytes, piece);
        Ok(())
    }

    fn map_staged(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        let span = piece.span;
        self.staged.fetch_add(1, Relaxed);
        steps.map(Space::Staging, piece).map_err(|e| ("pin for DMA", e))?;
        self.flush(steps, &self.map_bytes, piece);
        let copied = steps.copy(Space::Staging, Space::Live, piece).map_err(|e| ("map for DMA after the flush", e));
        let released = steps.unmap(Space::Staging, span).map_err(|e| ("release the staging mapping of", e));
        if copied.is_ok() && released.is_err() {
            undo(steps.unmap(Space::Live, span), span);
        }
        copied.and(released)
    }

    /// Takes `piece` away. On failure the device can still reach it; after ENOMEM, [`Self::unmap_detached`] needs none.
    ///
    /// # Errors
    /// The step that failed.
    pub(super) fn unmap(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        let span = piece.span;
        if !self.flushing || self.flush_after_map.load(Relaxed) {
            if self.flushing {
                self.flush(steps, &self.unmap_bytes, piece);
            }
            return steps.unmap(Space::Live, span).map_err(|e| ("IOMMU_IOAS_UNMAP", e));
        }
        self.staged.fetch_add(1, Relaxed);
        steps.copy(Space::Live, Space::Staging, piece).map_err(|e| ("keep pinned while flushing", e))?;
        if let Err(error) = steps.unmap(Space::Live, span) {
            undo(steps.unmap(Space::Staging, span), span);
            return Err(("IOMMU_IOAS_UNMAP", error));
        }
        self.flush(steps, &self.unmap_bytes, piece);
        // Unreachable and flushed: whatever happens to the pin now, the promise to the caller is kept.
        undo(steps.unmap(Space::Staging, span), span);
        Ok(())
    }

    /// Takes `piece` away from a device that has nothing in flight, without the staging space.
    ///
    /// # Errors
    /// The step that failed. If it was the last one the device can reach nothing any more, and its next reset fails.
    pub(super) fn unmap_detached(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        steps.detach().map_err(|e| ("detach the device, for want of memory, to unmap", e))?;
        self.flush(steps, &self.unmap_bytes, piece);
        let unmapped = steps.unmap(Space::Live, piece.span).map_err(|e| ("IOMMU_IOAS_UNMAP", e));
        steps.attach().map_err(|e| ("attach the device again after unmapping", e)).and(unmapped)
    }

    fn switch_to_flush_after_map(&self) {
        if !self.flush_after_map.swap(true, Relaxed) {
            log::warn!(
                "this IOMMU's driver maps nothing before a device is attached (ENODEV): \
                 from now on memory is mapped, flushed, and only then named in a request"
            );
        }
    }

    fn flush(&self, steps: &dyn Steps, counter: &AtomicU64, piece: Piece<'_>) {
        let start = Instant::now();
        log::trace!("flush {}", piece.span);
        steps.flush(piece);
        log::trace!("flushed {}", piece.span);
        counter.fetch_add(piece.span.len(), Relaxed);
        self.nanoseconds.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// What it has cost so far; nothing is said of what is mapped.
    #[must_use]
    pub(super) fn cost(&self) -> SpaceStatistics {
        SpaceStatistics {
            staged: self.staged.load(Relaxed),
            flushed_at_map: self.map_bytes.load(Relaxed),
            flushed_at_unmap: self.unmap_bytes.load(Relaxed),
            flush_time: Duration::from_nanos(self.nanoseconds.load(Relaxed)),
            ..SpaceStatistics::default()
        }
    }

    /// The order in which memory is exposed, for a person.
    #[must_use]
    pub(super) fn order(&self) -> &'static str {
        match (self.flushing, self.flush_after_map.load(Relaxed)) {
            (false, _) => "mapped",
            (true, false) => "pinned, flushed, mapped",
            (true, true) => "mapped, flushed, published",
        }
    }
}

fn undo(result: io::Result<()>, span: Span<Iova>) {
    if let Err(error) = result {
        log::error!("unpin {span}: {error}; it stays pinned until this process ends");
    }
}
