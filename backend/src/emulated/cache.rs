//! CPU caches and DRAM as two memories, for a function that goes behind the caches: a flush that is missing or stands in
//! the wrong place becomes wrong data, on any machine.
//!
//! CPUs see mapped memory as it is. While the function sets No Snoop it sees DRAM, which is kept here. What one of them
//! writes reaches the other only when somebody flushes the line:
//!
//! ```text
//! a CPU has written the line since its last flush, or it was never flushed    DRAM := mapped memory   (written back)
//! no CPU has                                                                  mapped memory := DRAM   (invalidated)
//! ```
//!
//! Pinning may move the pages: what was flushed before is forgotten. And there are two moments at which the two memories
//! must agree, whatever happens afterwards: when the function becomes able to reach a page, and when the page is unpinned
//! and so may have another owner. Lines that do not are counted.
//!
//! A CPU has written if the line differs from what its last flush left. Such a line wins over what the function wrote
//! meanwhile, as in a machine. Unlike there, no line is ever written back or dropped by itself, so nothing works by luck.

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
const PAGE: usize = 4096;
/// What DRAM holds where nothing was ever written back: fresh memory has been zeroed through the caches.
const OLD: u8 = 0xdb;

/// DRAM under the pages that were flushed or reached by DMA, three bytes for each of theirs.
pub(super) struct Cache {
    state: Mutex<State>,
}

struct State {
    /// By the address of the page in this process.
    pages: HashMap<u64, Box<Page>>,
    /// With as many pages, those are forgotten whose memory is gone.
    tidy_at: usize,
    /// Where DMA finds a part of DRAM as memory.
    scratch: SharedMemory,
    stale_lines: StaleLines,
}

struct Page {
    /// The memory it belongs to; its address may be used again.
    mapping: Weak<dyn Any + Send + Sync>,
    dram: [u8; PAGE],
    /// What the last flush of each line left in mapped memory.
    left: [u8; PAGE],
    /// Bit n is set once line n has been flushed.
    flushed: u64,
}

/// Lines on which caches and DRAM did not agree when they had to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StaleLines {
    /// The function could have read what was in DRAM before the CPUs' last writes: another owner's data.
    pub exposed: u64,
    /// The CPUs would have gone on seeing, or written back over, what was there before the function's last writes.
    pub unpinned: u64,
}

/// A run of bytes in one page.
#[derive(Clone, Copy)]
struct Piece {
    page: u64,
    at: usize,
    /// Where it lies in the window.
    offset: usize,
    len: usize,
}

impl Cache {
    pub(super) fn new() -> io::Result<Self> {
        let scratch = SharedMemory::of(Arc::new(MmapRegion::new(PAGE).map_err(io::Error::other)?));
        Ok(Self {
            state: Mutex::new(State {
                pages: HashMap::new(),
                tidy_at: 1024,
                scratch,
                stale_lines: StaleLines::default(),
            }),
        })
    }

    /// `len` bytes from `offset` are about to be pinned, and get other pages for it.
    pub(super) fn moved(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        for Piece { page, .. } in pieces(shared, offset, len) {
            state.pages.remove(&page);
        }
    }

    /// The function can reach `len` bytes from `offset` from now on.
    pub(super) fn exposed(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        state.stale_lines.exposed += state.differ(shared, offset, len);
    }

    /// `len` bytes from `offset` are unpinned.
    pub(super) fn unpinned(&self, shared: &SharedMemory, offset: usize, len: usize) {
        let state = &mut *lock(&self.state);
        state.stale_lines.unpinned += state.differ(shared, offset, len);
    }

    pub(super) fn stale_lines(&self) -> StaleLines {
        lock(&self.state).stale_lines
    }

    /// A transfer that does not snoop: `part` is called with DRAM in place of `len` bytes at `offset` of `shared`.
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
    fn flush(&self, shared: &SharedMemory, offset: usize, len: usize) {
        assert!(offset <= shared.len() && len <= shared.len() - offset, "{len} bytes at {offset} of {shared:?}");
        if len == 0 {
            return;
        }
        // Whole lines, as far as the window reaches.
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
    /// How many lines of DRAM differ from what the CPUs see.
    fn differ(&mut self, shared: &SharedMemory, offset: usize, len: usize) -> u64 {
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

    /// The page at `address`, which lies in `shared`.
    fn page(&mut self, address: u64, shared: &SharedMemory) -> &mut Page {
        if self.pages.len() >= self.tidy_at {
            self.pages.retain(|_, page| page.lives());
            self.tidy_at = (self.pages.len() * 2).max(1024);
        }
        let page = self.pages.entry(address).or_insert_with(|| Page::new(shared));
        if !page.lives() {
            *page = Page::new(shared);
        }
        page
    }
}

impl Page {
    fn new(shared: &SharedMemory) -> Box<Self> {
        Box::new(Self { mapping: shared.mapping(), dram: [OLD; PAGE], left: [OLD; PAGE], flushed: 0 })
    }

    fn lives(&self) -> bool {
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
        let (dram, left) = (&mut self.dram[line.clone()], &mut self.left[line]);
        if self.flushed & bit == 0 || found != left {
            dram.copy_from_slice(found);
        } else {
            // Only what differs: a CPU may be writing its neighbour.
            for (i, (new, _)) in dram.iter().zip(&*found).enumerate().filter(|(_, (new, old))| new != old) {
                shared.write_u8(offset + i, *new);
            }
        }
        left.copy_from_slice(dram);
        self.flushed |= bit;
    }
}

/// The parts of `len` bytes at `offset` of `shared`, page by page.
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
