//! How one piece of memory becomes reachable for the device and how it stops being so, by regime.
//!
//! The kernel's map pins and makes reachable in one step, its unmap takes away and unpins in one step, and pinning may move
//! the pages. A flush is worth something only between the two halves, so under a flushing regime a second, never-attached
//! address space holds the pages meanwhile:
//!
//! ```text
//!             coherent       flushing (S: staging, V: live)
//! expose      MAP(V)         MAP(S) pins ── flush ── COPY(S→V) reachable ── UNMAP(S)
//! withdraw    UNMAP(V)       COPY(V→S) ── UNMAP(V) unreachable, still pinned ── flush ── UNMAP(S) unpins
//! ```
//!
//! Each step that fails undoes those before it.

use std::io;

use super::flusher::{Flusher, Moment};
use super::page_table::PageTable;
use crate::addr::{Iova, Span};
use crate::sys::{Ioas, Window};

/// What the verdict asks of the address space.
pub enum Regime {
    /// DMA is coherent.
    Coherent,
    /// DMA may go behind the CPU caches.
    Flushing(Box<Staging>),
}

/// The second address space, and what flushes.
pub struct Staging {
    pub(super) table: PageTable,
    pub(super) flusher: Flusher,
}

/// One piece of memory: where the device will find it, and this process's view of the same bytes.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) span: Span<Iova>,
    pub(super) window: &'a Window,
    pub(super) offset: usize,
}

impl Piece<'_> {
    fn flush(&self, flusher: &Flusher, moment: Moment) {
        let len = usize::try_from(self.span.len()).expect("a mapped piece fits the address space");
        flusher.flush(moment, self.window, self.offset, len);
    }
}

/// A step's name and the errno it failed with.
pub(super) type Failed = (&'static str, io::Error);

/// Makes `piece` reachable in `live`; `map` pins it into the address space it is given.
pub(super) fn expose(
    live: &PageTable,
    regime: &Regime,
    piece: Piece<'_>,
    map: impl Fn(&Ioas) -> io::Result<()>,
) -> Result<(), Failed> {
    let Regime::Flushing(staging) = regime else {
        return map(&live.ioas).map_err(|e| ("pin and map for DMA", e));
    };
    let (fd, pen) = (&live.iommufd, &staging.table.ioas);
    map(pen).map_err(|e| ("pin for DMA", e))?;
    piece.flush(&staging.flusher, Moment::Map);
    let copied = fd.copy(pen, &live.ioas, piece.span).map_err(|e| ("map for DMA after the flush", e));
    let released = fd.unmap(pen, piece.span).map_err(|e| ("release the staging mapping of", e));
    if copied.is_ok() && released.is_err() {
        undo(fd.unmap(&live.ioas, piece.span), piece.span);
    }
    copied.and(released)
}

/// Takes `piece` away from `live`. On failure the device can still reach it and it counts as mapped.
pub(super) fn withdraw(live: &PageTable, regime: &Regime, piece: Piece<'_>) -> Result<(), Failed> {
    let Regime::Flushing(staging) = regime else {
        return live.iommufd.unmap(&live.ioas, piece.span).map_err(|e| ("IOMMU_IOAS_UNMAP", e));
    };
    let (fd, pen) = (&live.iommufd, &staging.table.ioas);
    fd.copy(&live.ioas, pen, piece.span).map_err(|e| ("keep pinned while flushing", e))?;
    if let Err(error) = fd.unmap(&live.ioas, piece.span) {
        undo(fd.unmap(pen, piece.span), piece.span);
        return Err(("IOMMU_IOAS_UNMAP", error));
    }
    piece.flush(&staging.flusher, Moment::Unmap);
    // Unreachable and flushed: whatever happens to the pin now, the promise to the caller is kept.
    undo(fd.unmap(pen, piece.span), piece.span);
    Ok(())
}

fn undo(result: io::Result<()>, span: Span<Iova>) {
    if let Err(error) = result {
        log::error!("unpin {span}: {error}; it stays pinned until this process ends");
    }
}
