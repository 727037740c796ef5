//! The device's address space: one live IOAS, one page table made from it for this device alone, and a ledger of what is
//! mapped there.
//!
//! ```text
//! start   page table made ── attached, empty ── buffers mapped ── bus master on
//! add     allowed? free? ── exposed piece by piece ── entered in the ledger
//! remove  struck out ── withdrawn piece by piece
//! stop    bus master off, reset ── detach ── buffers withdrawn ── page table destroyed
//! ```
//!
//! What "expose" and "withdraw" mean is the regime's matter, see `sequence.rs`. Pieces, because the kernel can never split a
//! mapping; 1 GiB, because that is the largest IOMMU page.

mod flusher;
mod ledger;
mod page_table;
mod sequence;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, getrlimit};
use vm_memory::{FileOffset, MmapRegion};

pub use flusher::{Flushed, Flusher};
pub use page_table::{PageTable, Snoop};
pub use sequence::{Regime, Staging};

use crate::addr::{Address, Bytes, Iova, Span};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError};
use crate::memory::Region;
use crate::sys::{CacheLines, Ioas, Window};
use ledger::Ledger;
use sequence::{Failed, Piece};

/// The largest piece mapped by one call.
const CHUNK: u64 = 1 << 30;

/// The address space of one device. Buffers made from it keep it alive.
#[derive(Clone)]
pub struct LiveSpace(Arc<Live>);

struct Live {
    table: Arc<PageTable>,
    regime: Regime,
    ledger: Mutex<Ledger>,
    maps: AtomicU64,
}

impl LiveSpace {
    /// For a device whose DMA is coherent.
    #[must_use]
    pub fn coherent(table: Arc<PageTable>) -> Self {
        Self::with(table, Regime::Coherent)
    }

    /// For a device whose DMA may go behind the CPU caches; everything is flushed with `lines` before the device can reach
    /// it and after it no longer can.
    ///
    /// # Errors
    /// The errno of making the staging page table.
    pub fn flushing(table: Arc<PageTable>, lines: CacheLines) -> io::Result<Self> {
        let staging = Staging { table: table.staging()?, flusher: Flusher::new(lines) };
        Ok(Self::with(table, Regime::Flushing(Box::new(staging))))
    }

    fn with(table: Arc<PageTable>, regime: Regime) -> Self {
        Self(Arc::new(Live { table, regime, ledger: Mutex::new(Ledger::default()), maps: AtomicU64::new(0) }))
    }

    /// How many times memory has been mapped so far: regions and buffers, by pieces of 1 GiB; never requests.
    #[must_use]
    pub fn maps(&self) -> u64 {
        self.0.maps.load(Ordering::Relaxed)
    }

    /// What has been flushed at map and unmap so far; `None` under a coherent verdict.
    #[must_use]
    pub fn flushed(&self) -> Option<Flushed> {
        match &self.0.regime {
            Regime::Coherent => None,
            Regime::Flushing(staging) => Some(staging.flusher.flushed()),
        }
    }
}

impl Live {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranges this address space allows now; asked each time, because attaching a device narrows them.
    fn allowed(&self, about: Span<Iova>) -> Result<Vec<Span<Iova>>, MapError> {
        let kernel = |source| MapError::Kernel { what: "IOMMU_IOAS_IOVA_RANGES for", span: about, source };
        self.table.iommufd.iova_ranges(&self.table.ioas).map_err(kernel)
    }

    /// Exposes all of `whole` with `map`, piece by piece; what had been exposed is withdrawn again if a piece fails.
    fn expose(&self, whole: Piece<'_>, map: impl Fn(&Ioas, Piece<'_>) -> io::Result<()>) -> Result<(), MapError> {
        let mut progress = Progress::new(whole.span);
        for piece in pieces(whole) {
            let exposed = sequence::expose(&self.table, &self.regime, piece, |ioas| map(ioas, piece));
            if let Err(failed) = exposed {
                let done = piece.span.start().raw() - whole.span.start().raw();
                if let Some(span) = Span::new(whole.span.start(), done) {
                    self.withdraw(Piece { span, ..whole })?;
                }
                return Err(self.explain(piece.span, failed));
            }
            self.maps.fetch_add(1, Ordering::Relaxed);
            progress.tick(piece.span);
        }
        Ok(())
    }

    fn withdraw(&self, whole: Piece<'_>) -> Result<(), MapError> {
        for piece in pieces(whole) {
            let kernel = |(what, source)| MapError::Kernel { what, span: piece.span, source };
            sequence::withdraw(&self.table, &self.regime, piece).map_err(kernel)?;
        }
        Ok(())
    }

    /// Pins one piece of a file into `ioas`, or of this process's view of it where the kernel cannot pin the file.
    fn map_piece(&self, ioas: &Ioas, piece: Piece<'_>, file: Option<(impl AsFd, u64)>) -> io::Result<()> {
        if let Some((file, offset)) = file {
            match self.table.iommufd.map_file(ioas, file.as_fd(), offset, piece.span) {
                // Linux before 6.13 does not know the call.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
                other => return other,
            }
        }
        self.table.iommufd.map_window(ioas, piece.window, piece.offset, piece.span)
    }

    /// Turns ENOMEM into the limit it stands for, if that is what it is.
    fn explain(&self, span: Span<Iova>, (what, source): Failed) -> MapError {
        let limit = getrlimit(Resource::Memlock).current;
        let pinned: u64 = self.ledger().spans().map(|span| span.len()).sum();
        let needed = pinned.saturating_add(span.len());
        match limit {
            Some(limit) if source.raw_os_error() == Some(libc::ENOMEM) && needed > limit => {
                MapError::MemLock { span, needed_kib: needed / 1024, allowed_kib: limit / 1024 }
            }
            _ => MapError::Kernel { what, span, source },
        }
    }
}

/// `whole`, cut at multiples of [`CHUNK`].
fn pieces(whole: Piece<'_>) -> impl Iterator<Item = Piece<'_>> {
    whole.span.chunks(CHUNK).map(move |span| {
        let inside = span.start().raw() - whole.span.start().raw();
        let offset = whole.offset + usize::try_from(inside).expect("a mapped region fits the address space");
        Piece { span, offset, ..whole }
    })
}

/// All of a region.
fn region_piece(region: &Region) -> Piece<'_> {
    Piece { span: region.gpa().identity_iova(), window: region.window(), offset: 0 }
}

impl AddressSpace for LiveSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let whole = region_piece(region);
        let allowed = self.0.allowed(whole.span)?;
        if !allowed.iter().any(|range| range.covers(&whole.span)) {
            return Err(MapError::NotAllowed { span: whole.span, allowed: list(&allowed) });
        }
        if let Some(taken) = self.0.ledger().conflict(whole.span) {
            return Err(MapError::Overlap { span: whole.span, taken });
        }
        self.0.expose(whole, |ioas, piece| {
            let file = region.pinnable().then(|| (region.file(), region.offset() + piece.offset as u64));
            self.0.map_piece(ioas, piece, file)
        })?;
        self.0.ledger().enter(whole.span);
        Ok(())
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        let whole = region_piece(region);
        if !self.0.ledger().strike(whole.span) {
            return Err(MapError::NotMapped { span: whole.span });
        }
        self.0.withdraw(whole).inspect_err(|_| self.0.ledger().enter(whole.span))
    }

    fn pins(&self) -> bool {
        true
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        match &self.0.regime {
            Regime::Coherent => None,
            Regime::Flushing(staging) => Some(Arc::new(staging.flusher.lines())),
        }
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let failed = |source| MapError::Allocate { bytes, source };
        let page = rustix::param::page_size();
        let len = bytes.checked_next_multiple_of(page).ok_or(MapError::NoIova(bytes))?;
        let file = memfd_create("vhost-device-vfio-dma", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        ftruncate(&file, len as u64).map_err(|e| failed(e.into()))?;
        let place = FileOffset::new(file.into(), 0);
        let mapping = MmapRegion::from_file(place.clone(), len).map_err(|e| failed(io::Error::other(e)))?;
        let window = Window::of(Arc::new(mapping));

        let zero = Span::new(Iova(0), len as u64).ok_or(MapError::NoIova(bytes))?;
        let allowed = self.0.allowed(zero)?;
        let gap = self.0.ledger().highest_gap(&allowed, len as u64, page as u64);
        let span = gap.ok_or(MapError::NoIova(bytes))?;
        self.0.ledger().enter(span);
        let whole = Piece { span, window: &window, offset: 0 };
        let map =
            |ioas: &Ioas, piece: Piece<'_>| self.0.map_piece(ioas, piece, Some((place.file(), piece.offset as u64)));
        if let Err(error) = self.0.expose(whole, map) {
            self.0.ledger().strike(span);
            return Err(error);
        }
        let mapping = Mapped { space: Arc::clone(&self.0), span, window: window.clone() };
        Ok(DmaBuffer::new(window, span, Box::new(mapping)))
    }
}

/// A buffer's mapping; taken away on drop.
struct Mapped {
    space: Arc<Live>,
    span: Span<Iova>,
    window: Window,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(error) = self.space.withdraw(Piece { span: self.span, window: &self.window, offset: 0 }) {
            log::error!("{error}");
        }
        self.space.ledger().strike(self.span);
    }
}

/// Tells a person once a second how far a long map has come; the virtual machine stands still meanwhile.
struct Progress {
    whole: Span<Iova>,
    reported: Instant,
}

impl Progress {
    fn new(whole: Span<Iova>) -> Self {
        Self { whole, reported: Instant::now() }
    }

    fn tick(&mut self, done: Span<Iova>) {
        if self.reported.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.reported = Instant::now();
        let bytes = done.last().raw() - self.whole.start().raw() + 1;
        log::info!("mapping {}: {} of {}", self.whole, Bytes(bytes), Bytes(self.whole.len()));
    }
}

fn list(spans: &[Span<Iova>]) -> String {
    let words: Vec<_> = spans.iter().map(|span| format!("{}-{}", span.start(), span.last())).collect();
    words.join(", ")
}
