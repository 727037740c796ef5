//! How one piece of memory is mapped for the device, and unmapped.
//!
//! The kernel's map pins pages and makes them reachable in one step; its unmap makes them unreachable and unpins them in one
//! step. Pinning may move the pages. A flush must run while the pages are pinned and unreachable. So where DMA bypasses the
//! CPU caches, a second address space, which is never attached, keeps the pages pinned during the flush:
//!
//! ```text
//! (S: staging, V: live)
//! Coherent       map    MAP(V)
//!                unmap  UNMAP(V)
//! Staged         map    MAP(S) pins ── flush ── COPY(S→V) reachable ── UNMAP(S)
//!                unmap  COPY(V→S) ── UNMAP(V) unreachable, still pinned ── flush ── UNMAP(S) unpins
//! Detached       unmap  DETACH ── flush ── UNMAP(V) ── ATTACH      if COPY(V→S) fails for lack of memory (ENOMEM)
//! FlushAfterMap  map    MAP(V) ── flush                            if nothing can be mapped before an attach (ENODEV),
//!                unmap  flush ── UNMAP(V)                         and with type1, which has one address space only
//! ```
//!
//! A flush works on this process's view of the file. If the front-end truncates the file after the pin, the view has other pages
//! than those pinned, which then are not flushed. So a map fails if the view has lost pages by the end of its flush.
//!
//! Detached blocks all DMA of the device, so the device must be idle. FlushAfterMap depends on the engine, which uses memory
//! in a request only after the map has returned, and unmaps it only when no request uses it. In passthrough the guest's
//! driver decides that, so the map fails instead. A step that fails undoes the steps before it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::addr::{Address, Iova, Span};
use crate::hardware::SpaceStatistics;
use crate::rate_limited_log::SharedLog;
use crate::sys::SharedMemory;

/// A front-end can have memory mapped and unmapped again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// One of the two address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The one the device is attached to.
    Live,
    /// The one the device is never attached to: what is mapped there is pinned and unreachable.
    Staging,
}

/// One piece of memory: its IOVA range, and this process's view of the same bytes.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// The device's addresses.
    pub span: Span<Iova>,
    /// This process's view.
    pub shared: &'a SharedMemory,
    /// Start of the piece in `shared`, in bytes.
    pub offset: usize,
    /// The file and the offset of the piece in it (bytes), if it is mapped by IOMMU_IOAS_MAP_FILE.
    pub file: Option<(BorrowedFd<'a>, u64)>,
    /// The device may write it.
    pub writable: bool,
}

impl Piece<'_> {
    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::try_from(self.span.len()).expect("a mapped piece fits the address space")
    }

    /// The part at `span`, which lies inside.
    #[must_use]
    pub fn part(&self, span: Span<Iova>) -> Self {
        let inside = span.start().raw() - self.span.start().raw();
        let offset = self.offset + usize::try_from(inside).expect("a mapped piece fits the address space");
        Self { span, offset, file: self.file.map(|(file, at)| (file, at + inside)), ..*self }
    }
}

/// The steps: each is one system call or one flush. Every error is an errno.
pub trait Steps {
    /// Pins `piece` and maps it in `space`.
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()>;
    /// Maps `piece` in `to` as it is mapped in `from`; both share the pin.
    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()>;
    /// Unmaps, and unpins unless the other space maps the same pages.
    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()>;
    /// Writes back and invalidates every cache line of `piece`.
    fn flush(&self, piece: Piece<'_>);
    /// Blocks all DMA of the device; mapped memory stays pinned.
    fn detach(&self) -> io::Result<()>;
    /// Undoes [`Steps::detach`].
    fn attach(&self) -> io::Result<()>;
}

/// The step that fails if there is no staging space.
const FLUSH_BEFORE_MAP: &str =
    "flush before the device can reach it (memory can only be mapped here for a device that reaches it at once)";

/// The step that fails if the kernel does not unmap.
const UNMAP: &str = "unmap";

/// The step that fails if the view has other pages than those that are pinned.
const FLUSH_THE_PINNED: &str = "flush (the front-end has truncated the file, so the pinned pages cannot be reached)";

/// The step that failed, and its errno.
pub(super) type Failed = (&'static str, io::Error);

/// The regime of a device, and the cost of the flushes so far.
pub(super) struct Sequence {
    flushing: bool,
    flush_after_map: AtomicBool,
    /// FlushAfterMap is not allowed: nothing keeps the device from memory that is mapped but not flushed yet.
    flush_before_map: AtomicBool,
    staged: AtomicU64,
    map_bytes: AtomicU64,
    unmap_bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Sequence {
    /// `flushing` if the device's DMA may bypass the caches.
    #[must_use]
    pub(super) fn new(flushing: bool) -> Self {
        let zero = || AtomicU64::new(0);
        let (staged, map_bytes, unmap_bytes, nanoseconds) = (zero(), zero(), zero(), zero());
        let no = || AtomicBool::new(false);
        let (flush_after_map, flush_before_map) = (no(), no());
        Self { flushing, flush_after_map, flush_before_map, staged, map_bytes, unmap_bytes, nanoseconds }
    }

    /// As [`Self::new`], where there is no staging space.
    #[must_use]
    pub(super) fn without_staging(flushing: bool) -> Self {
        Self { flush_after_map: AtomicBool::new(flushing), ..Self::new(flushing) }
    }

    /// See [`AddressSpace::require_flush_before_map`](crate::hardware::AddressSpace::require_flush_before_map).
    pub(super) fn require_flush_before_map(&self) {
        self.flush_before_map.store(true, Relaxed);
    }

    /// Maps `piece`.
    ///
    /// # Errors
    /// The step that failed; nothing is mapped then.
    pub(super) fn map(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        if !self.flushing {
            return steps.map(Space::Live, piece).map_err(|e| ("pin and map for DMA", e));
        }
        if !self.flush_after_map.load(Relaxed) {
            match self.map_staged(steps, piece) {
                Err((_, error)) if error.raw_os_error() == Some(libc::ENODEV) => {}
                other => return other,
            }
        }
        if self.flush_before_map.load(Relaxed) {
            return Err((FLUSH_BEFORE_MAP, io::Error::from_raw_os_error(libc::ENODEV)));
        }
        self.switch_to_flush_after_map();
        steps.map(Space::Live, piece).map_err(|e| ("pin and map for DMA", e))?;
        let flushed = self.flush_mapped(steps, piece);
        if flushed.is_err() {
            undo(steps.unmap(Space::Live, piece.span), piece.span);
        }
        flushed
    }

    /// Flushes `piece`, which is mapped already.
    ///
    /// # Errors
    /// The view has other pages than those pinned.
    pub(super) fn flush_mapped(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        self.flush(steps, &self.map_bytes, piece);
        all_flushed(piece)
    }

    fn map_staged(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        let span = piece.span;
        self.staged.fetch_add(1, Relaxed);
        steps.map(Space::Staging, piece).map_err(|e| ("pin for DMA", e))?;
        self.flush(steps, &self.map_bytes, piece);
        let copy = || steps.copy(Space::Staging, Space::Live, piece).map_err(|e| ("map for DMA after the flush", e));
        let copied = all_flushed(piece).and_then(|()| copy());
        let released = steps.unmap(Space::Staging, span).map_err(|e| ("release the staging mapping of", e));
        if copied.is_ok() && released.is_err() {
            undo(steps.unmap(Space::Live, span), span);
        }
        copied.and(released)
    }

    /// Unmaps `piece`. On failure the device can still reach it. After ENOMEM, use [`Self::unmap_detached`], which needs no
    /// kernel memory.
    ///
    /// # Errors
    /// The step that failed.
    pub(super) fn unmap(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        let span = piece.span;
        if !self.flushing || self.flush_after_map.load(Relaxed) {
            if self.flushing {
                self.flush(steps, &self.unmap_bytes, piece);
            }
            return steps.unmap(Space::Live, span).map_err(|e| (UNMAP, e));
        }
        self.staged.fetch_add(1, Relaxed);
        steps.copy(Space::Live, Space::Staging, piece).map_err(|e| ("keep pinned while flushing", e))?;
        if let Err(error) = steps.unmap(Space::Live, span) {
            undo(steps.unmap(Space::Staging, span), span);
            return Err((UNMAP, error));
        }
        self.flush(steps, &self.unmap_bytes, piece);
        // The piece is unreachable and flushed, so the unmap has succeeded even if it stays pinned.
        undo(steps.unmap(Space::Staging, span), span);
        Ok(())
    }

    /// Unmaps `piece` without the staging space. The device must be idle.
    ///
    /// # Errors
    /// The step that failed. If it was the attach, the device can reach no memory, and its next reset fails.
    pub(super) fn unmap_detached(&self, steps: &dyn Steps, piece: Piece<'_>) -> Result<(), Failed> {
        steps.detach().map_err(|e| ("out of memory; detach the device to unmap", e))?;
        self.flush(steps, &self.unmap_bytes, piece);
        let unmapped = steps.unmap(Space::Live, piece.span).map_err(|e| (UNMAP, e));
        steps.attach().map_err(|e| ("attach the device again after unmapping", e)).and(unmapped)
    }

    fn switch_to_flush_after_map(&self) {
        if !self.flush_after_map.swap(true, Relaxed) {
            log::warn!(
                "this IOMMU driver maps nothing before a device is attached (ENODEV): \
                 from now on memory is mapped, then flushed, and only then used in requests"
            );
        }
    }

    /// Unmaps `piece` where the device may be busy and the kernel lacks the memory for [`Self::unmap`]: the pages are flushed as
    /// soon as the device can no longer reach them, but no longer pinned. Only for memory of which the guest knows nothing yet.
    ///
    /// # Errors
    /// The errno of the unmap; the device can still reach the piece.
    pub(super) fn unmap_unpinned(&self, steps: &dyn Steps, piece: Piece<'_>) -> io::Result<()> {
        steps.unmap(Space::Live, piece.span)?;
        if self.flushing {
            self.flush(steps, &self.unmap_bytes, piece);
        }
        Ok(())
    }

    fn flush(&self, steps: &dyn Steps, counter: &AtomicU64, piece: Piece<'_>) {
        let start = Instant::now();
        log::trace!("flush {}", piece.span);
        steps.flush(piece);
        log::trace!("flushed {}", piece.span);
        counter.fetch_add(piece.span.len(), Relaxed);
        self.nanoseconds.fetch_add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The cost of the flushes so far; the counters of mapped memory are left at 0.
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

    /// The order of the steps by which memory is mapped, as text.
    #[must_use]
    pub(super) fn order(&self) -> &'static str {
        match (self.flushing, self.flush_after_map.load(Relaxed)) {
            (false, _) => "mapped",
            (true, false) => "pinned, flushed, mapped",
            (true, true) => "mapped, flushed, published",
        }
    }
}

/// Fails if the view of `piece` has lost pages.
fn all_flushed(piece: Piece<'_>) -> Result<(), Failed> {
    match piece.shared.lost_pages() {
        0 => Ok(()),
        _ => Err((FLUSH_THE_PINNED, io::Error::from_raw_os_error(libc::EFAULT))),
    }
}

fn undo(result: io::Result<()>, span: Span<Iova>) {
    if let Err(error) = result {
        LOG.error(|| format!("unpin {span}: {error}; it stays pinned until this process ends"));
    }
}

#[cfg(test)]
mod tests;
