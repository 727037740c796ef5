//! Models CPU caches and DRAM as two separate memories, for a function that uses No Snoop. A missing or misplaced flush then
//! produces wrong data on any machine.
//!
//! CPUs access the mapped memory, which stands for the caches. While the function sets No Snoop, it accesses DRAM, which is
//! kept here. A write by one side becomes visible to the other only when the line is flushed:
//!
//! ```text
//! a CPU has written the line since its last flush, or it was never flushed    DRAM := mapped memory   (written back)
//! no CPU has                                                                  mapped memory := DRAM   (invalidated)
//! ```
//!
//! Pinning may migrate pages, so it discards the flush state of a page. Both memories must agree at two times: when a page is
//! mapped for the function, and when it is unpinned, because it may then get another owner. Lines that differ are counted.
//!
//! A line counts as written by a CPU if it differs from what its last flush left. Such a line overwrites what the function
//! wrote meanwhile, as on real hardware. Unlike there, no line is ever written back or evicted on its own, so a missing flush
//! always has an effect.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use vm_memory::MmapRegion;

use crate::hardware::CacheFlush;
use crate::sys::SharedMemory;

use super::lock;
use super::mapping::Access;

const LINE: usize = 64;
/// Two lines, bytes, as on most processors.
const GRANULE: u64 = 2 * LINE as u64;
const PAGE: usize = 4096;
/// Content of DRAM that was never written back. It differs from zero because new memory is zeroed through the caches.
const STALE: u8 = 0xdb;

/// DRAM contents of all pages that were flushed or accessed by DMA.
pub(super) struct Cache {
    state: Mutex<State>,
}

struct State {
    /// Keyed by the page's address in this process.
    pages: HashMap<u64, Box<Page>>,
    /// When `pages` reaches this size, pages whose memory is no longer mapped are removed.
    prune_at: usize,
    /// Buffer through which DMA accesses a part of DRAM.
    scratch: SharedMemory,
    stale_lines: StaleLines,
}

struct Page {
    /// The mapping that contains the page. Its address may be reused later.
    mapping: Weak<dyn Any + Send + Sync>,
    dram: [u8; PAGE],
    /// Mapped memory as the last flush of each line left it.
    after_flush: [u8; PAGE],
    /// Bit n is set once line n has been flushed.
    flushed: u64,
}

/// Number of lines that differed between caches and DRAM when they had to agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StaleLines {
    /// When memory was mapped: the function could have read older data from DRAM, possibly that of a former owner.
    pub at_map: u64,
    /// When memory was unpinned: CPUs could have read, or written back, data older than the function's last writes.
    pub at_unpin: u64,
}

/// A range of bytes inside one page.
#[derive(Clone, Copy)]
struct Piece {
    /// Address of the page in this process.
    page: u64,
    /// Offset in the page.
    at: usize,
    /// Offset in the shared memory.
    offset: usize,
    len: usize,
}

impl Cache {
    pub(super) fn new() -> io::Result<Self> {
        let scratch = SharedMemory::of(Arc::new(MmapRegion::new(PAGE).map_err(io::Error::other)?));
        Ok(Self {
            state: Mutex::new(State {
                pages: HashMap::new(),
                prune_at: 1024,
                scratch,
                stale_lines: StaleLines::default(),
            }),
        })
    }

    /// The `len` bytes at `offset` are about to be pinned, which may migrate them to other pages.
    pub(super) fn pages_migrated(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        for Piece { page, .. } in pieces(shared, offset, len) {
            state.pages.remove(&page);
        }
    }

    /// The `len` bytes at `offset` were mapped for the function: counts stale lines.
    pub(super) fn mapped(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        state.stale_lines.at_map += state.count_stale(shared, offset, len);
    }

    /// The `len` bytes at `offset` were unpinned: counts stale lines.
    pub(super) fn unpinned(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        state.stale_lines.at_unpin += state.count_stale(shared, offset, len);
    }

    pub(super) fn stale_lines(&self) -> StaleLines {
        lock(&self.state).stale_lines
    }

    /// A No Snoop transfer of `len` bytes at `offset` of `shared`: calls `part` with the DRAM contents instead.
    pub(super) fn transfer<E>(
        &self,
        access: Access,
        shared: &SharedMemory,
        (offset, len): (usize, usize),
        mut part: impl FnMut(&SharedMemory, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let state = &mut *lock(&self.state);
        let scratch = state.scratch.clone();
        for Piece { page, at, len, .. } in pieces(shared, offset, len) {
            let dram = &mut state.page(page, shared).dram[at..at + len];
            scratch.copy_from(at, dram);
            part(&scratch, at, len)?;
            if access == Access::Write {
                scratch.copy_to(at, dram);
            }
        }
        Ok(())
    }
}

impl CacheFlush for Cache {
    fn granule(&self) -> u64 {
        GRANULE
    }

    fn flush(&self, shared: &SharedMemory, offset: usize, len: usize) {
        assert!(offset <= shared.len() && len <= shared.len() - offset, "{len} bytes at {offset} of {shared:?}");
        if len == 0 {
            return;
        }
        // Whole lines, limited to the mapping.
        let base = usize::try_from(shared.host_address()).expect("a 64-bit address");
        let start = ((base + offset) & !(LINE - 1)).max(base) - base;
        let end = ((base + offset + len).next_multiple_of(LINE) - base).min(shared.len());
        let state = &mut *lock(&self.state);
        for piece in pieces(shared, start, end - start) {
            state.page(piece.page, shared).flush(shared, piece);
        }
    }
}

impl State {
    /// Number of lines whose DRAM contents differ from what CPUs see.
    fn count_stale(&mut self, shared: &SharedMemory, offset: usize, len: usize) -> u64 {
        let mut lines = 0;
        let mut seen = [0; PAGE];
        for piece in pieces(shared, offset, len) {
            let seen = &mut seen[..piece.len];
            shared.copy_to(piece.offset, seen);
            let dram = &self.page(piece.page, shared).dram[piece.at..piece.at + piece.len];
            lines += seen.chunks(LINE).zip(dram.chunks(LINE)).filter(|(seen, dram)| seen != dram).count() as u64;
        }
        lines
    }

    /// The page at `address` in `shared`.
    fn page(&mut self, address: u64, shared: &SharedMemory) -> &mut Page {
        if self.pages.len() >= self.prune_at {
            self.pages.retain(|_, page| page.is_mapped());
            self.prune_at = (self.pages.len() * 2).max(1024);
        }
        let page = self.pages.entry(address).or_insert_with(|| Page::new(shared));
        if !page.is_mapped() {
            *page = Page::new(shared);
        }
        page
    }
}

impl Page {
    fn new(shared: &SharedMemory) -> Box<Self> {
        Box::new(Self { mapping: shared.mapping(), dram: [STALE; PAGE], after_flush: [STALE; PAGE], flushed: 0 })
    }

    fn is_mapped(&self) -> bool {
        self.mapping.strong_count() != 0
    }

    fn flush(&mut self, shared: &SharedMemory, piece: Piece) {
        let (mut at, mut offset) = (piece.at, piece.offset);
        let end = piece.at + piece.len;
        while at < end {
            let next = (at + 1).next_multiple_of(LINE).min(end);
            self.flush_line(shared, offset, at..next);
            offset += next - at;
            at = next;
        }
    }

    fn flush_line(&mut self, shared: &SharedMemory, offset: usize, line: std::ops::Range<usize>) {
        let bit = 1 << (line.start / LINE);
        let mut found = [0; LINE];
        let found = &mut found[..line.len()];
        shared.copy_to(offset, found);
        let (dram, after_flush) = (&mut self.dram[line.clone()], &mut self.after_flush[line]);
        if self.flushed & bit == 0 || found != after_flush {
            dram.copy_from_slice(found);
        } else {
            // Only bytes that differ: a CPU may be writing a neighbouring byte.
            for (i, (new, _)) in dram.iter().zip(&*found).enumerate().filter(|(_, (new, old))| new != old) {
                shared.write_u8(offset + i, *new);
            }
        }
        after_flush.copy_from_slice(dram);
        self.flushed |= bit;
    }
}

/// Splits `len` bytes at `offset` of `shared` by page.
fn pieces(shared: &SharedMemory, offset: usize, len: usize) -> impl Iterator<Item = Piece> {
    let base = shared.host_address();
    let end = offset + len;
    let mut next = offset;
    std::iter::from_fn(move || {
        let address = base + next as u64;
        let at = usize::try_from(address % PAGE as u64).expect("inside a page");
        let piece = Piece { page: address - at as u64, at, offset: next, len: (PAGE - at).min(end - next) };
        next += piece.len;
        (piece.len != 0).then_some(piece)
    })
}
