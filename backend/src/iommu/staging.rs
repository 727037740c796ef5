//! What a flushing regime needs besides the live IOAS.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::flusher::flush;
use super::page_table::PageTable;
use crate::addr::{Iova, Span};
use crate::sys::{CacheLines, Ioas, SharedMemory};

/// All mapped memory, by its start.
pub(super) type Flushable = BTreeMap<Iova, (Span<Iova>, SharedMemory)>;

/// See the top of this file.
pub(super) struct Staging {
    pub(super) lines: CacheLines,
    pub(super) ioas: Ioas,
    /// The staging page table, which is never attached. `None` while the device is released: nothing is pinned then.
    table: Mutex<Option<PageTable>>,
    /// All mapped memory, which is flushed when the device is released or reacquired. The lock is held across each map and
    /// unmap, so neither runs during that flush.
    flushable: Mutex<Flushable>,
}

impl Staging {
    /// `table` is that of `ioas`.
    pub(super) fn new(lines: CacheLines, ioas: Ioas, table: PageTable) -> Self {
        Self { lines, ioas, table: Mutex::new(Some(table)), flushable: Mutex::default() }
    }

    /// An empty one, for the device of `live`.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub(super) fn for_device_of(live: &PageTable, lines: CacheLines) -> io::Result<Self> {
        let ioas = live.iommufd().alloc_ioas()?;
        let table = live.for_staging(&ioas)?;
        Ok(Self::new(lines, ioas, table))
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Option<PageTable>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn flushable(&self) -> MutexGuard<'_, Flushable> {
        self.flushable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush_all(&self, flushable: &Flushable) {
        for (_, shared) in flushable.values() {
            flush(&self.lines, shared, 0, shared.len());
        }
    }

    /// The device does no DMA any more: flushes all memory, which is then no longer kept pinned here.
    pub(super) fn release(&self) {
        let flushable = self.flushable();
        self.flush_all(&flushable);
        *self.table() = None;
    }

    /// The device is back, with the page table `live`, and does no DMA yet.
    ///
    /// # Errors
    /// The errno of allocating another staging page table, or that memory cannot be flushed.
    pub(super) fn rejoin(&self, live: &PageTable) -> io::Result<()> {
        let flushable = self.flushable();
        *self.table() = Some(live.for_staging(&self.ioas)?);
        self.flush_all(&flushable);
        if flushable.values().any(|(_, shared)| shared.lost_pages() != 0) {
            *self.table() = None;
            return Err(io::Error::other("the front-end has truncated its memory, so it cannot be flushed"));
        }
        Ok(())
    }
}
