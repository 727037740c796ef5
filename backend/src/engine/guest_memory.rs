//! Guest memory as one worker sees it: the published table, and while memory is being removed also the previous one, for
//! requests that were checked against it. No request outlives the memory it uses, so the two tables never conflict.
//!
//! Each kind of look-up on the fast path keeps its own hint, because header, data, status and indirect tables tend to lie in
//! different regions.

mod batch;
mod window;

use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use crate::addr::{Address, Gpa, Iova, IovaSlice, Span};
use crate::hardware::CacheFlush;
use crate::memory::{MemTable, Region};
use crate::sys::{SharedArray, SharedMemory};
pub use batch::BatchView;
use window::{Window, find};

/// One worker's view of guest memory.
#[derive(Default)]
pub struct GuestMemoryView {
    table: Arc<MemTable>,
    previous: Option<Arc<MemTable>>,
    regions: Regions,
    /// Where the device has the memory. That of the last table with regions: requests in flight may still use it.
    slice: IovaSlice,
    hints: Hints,
}

/// The table's regions, as the fast path needs them.
#[derive(Default)]
struct Regions {
    windows: Vec<Window>,
    /// Adjacent ones merged. Checking a data buffer against them follows no pointer.
    ranges: Vec<Span<Gpa>>,
}

/// What the last look-up of each kind has found: an index in [`Regions::windows`] or, for data, in [`Regions::ranges`].
#[derive(Default)]
struct Hints {
    header: usize,
    data: usize,
    status: usize,
    table: usize,
}

impl GuestMemoryView {
    /// The table that requests are checked against.
    #[must_use]
    pub fn table(&self) -> &MemTable {
        &self.table
    }

    /// Checks requests against `table` from now on. It contains every region of the former table.
    pub fn publish(&mut self, table: Arc<MemTable>) {
        self.set_table(table);
    }

    fn check_against(&mut self, table: &MemTable) {
        self.regions.ranges = ranges(table);
        self.slice = table.slice().unwrap_or(self.slice);
    }

    /// The guest physical range of guest memory that [`Self::data`] has translated.
    #[inline]
    #[must_use]
    pub fn gpa(&self, data: Span<Iova>) -> Span<Gpa> {
        self.slice.gpa(data)
    }

    /// Checks requests against `table` from now on. Requests in flight use the former table until
    /// [`Self::drop_previous_table`].
    pub fn replace_table(&mut self, table: Arc<MemTable>) {
        self.previous = Some(self.set_table(table));
    }

    /// Returns the former table.
    fn set_table(&mut self, table: Arc<MemTable>) -> Arc<MemTable> {
        self.check_against(&table);
        self.regions.windows = table.regions().iter().map(|region| Window::new(region)).collect();
        std::mem::replace(&mut self.table, table)
    }

    /// Drops the former table when no request in flight needs it.
    pub fn drop_previous_table(&mut self) {
        self.previous = None;
    }

    /// The IOVA of a data buffer, if all of it is guest memory.
    #[inline]
    pub fn data(&mut self, span: Span<Gpa>) -> Option<Span<Iova>> {
        if self.regions.ranges.get(self.hints.data).is_some_and(|range| range.covers(&span)) {
            return Some(self.slice.iova(span));
        }
        let after = self.regions.ranges.partition_point(|range| range.start() <= span.start());
        let index = after.checked_sub(1)?;
        self.hints.data = index;
        self.regions.ranges[index].covers(&span).then(|| self.slice.iova(span))
    }

    /// True if the byte at `address` is guest memory.
    #[inline]
    pub fn has_status(&mut self, address: Gpa) -> bool {
        find(&self.regions.windows, address, 1, &mut self.hints.status).is_some()
    }

    /// Writes a status byte that [`Self::has_status`] has found, possibly in the former table.
    #[inline(always)]
    pub fn write_status(&mut self, address: Gpa, status: u8) {
        match find(&self.regions.windows, address, 1, &mut self.hints.status) {
            Some((shared, offset)) => shared.write_u8(offset, status),
            None => self.write_former_status(address, status),
        }
    }

    #[cold]
    fn write_former_status(&self, address: Gpa, status: u8) {
        self.copy_in(Span::new(address, 1).expect("one byte never wraps"), &[status]);
    }

    /// The memory of an indirect table, or of one entry. `None` unless all of it lies in one region.
    #[inline]
    pub fn table_memory(&mut self, span: Span<Gpa>) -> Option<(&SharedMemory, usize)> {
        find(&self.regions.windows, span.start(), usize::try_from(span.len()).ok()?, &mut self.hints.table)
    }

    /// The `entries` descriptors in `span`. `None` unless they lie in one region and are aligned to 8 bytes.
    #[inline]
    pub fn descriptors(&mut self, span: Span<Gpa>, entries: u16) -> Option<SharedArray<&SharedMemory, u64, 2>> {
        self.table_memory(span).and_then(|(shared, offset)| shared.array(offset, entries.into()))
    }

    /// Reads a structure from the start of `spans`, whatever their boundaries.
    #[inline]
    pub fn read_header<T: FromBytes + IntoBytes>(&mut self, spans: &[Span<Gpa>]) -> Option<T> {
        let bytes = size_of::<T>();
        let front = spans.first().filter(|span| span.len() >= bytes as u64).map(Span::start);
        if let Some((shared, offset)) =
            front.and_then(|at| find(&self.regions.windows, at, bytes, &mut self.hints.header))
        {
            return Some(shared.read(offset));
        }
        self.gather_header(spans)
    }

    #[cold]
    fn gather_header<T: FromBytes + IntoBytes>(&self, spans: &[Span<Gpa>]) -> Option<T> {
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        let mut done = 0;
        for span in spans {
            let wanted = span.slice(0, span.len().min((bytes.len() - done) as u64));
            for (shared, offset, len) in self.pieces(wanted?) {
                shared?.copy_to(offset, &mut bytes[done..done + len]);
                done += len;
            }
            if done == bytes.len() {
                return Some(value);
            }
        }
        None
    }

    /// Copies `bytes` to the start of `span`, which is guest memory.
    fn copy_in(&self, span: Span<Gpa>, bytes: &[u8]) {
        let mut done = 0;
        for (shared, offset, len) in self.pieces(span) {
            let Some(shared) = shared else { return };
            let part = len.min(bytes.len() - done);
            shared.copy_from(offset, &bytes[done..done + part]);
            done += part;
        }
    }

    /// Copies as much of `bytes` as fits to `spans`. Returns the number of bytes copied.
    pub fn scatter(&self, spans: &[Span<Iova>], bytes: &[u8]) -> usize {
        let mut done = 0_usize;
        for span in spans {
            let end = bytes.len().min(done.saturating_add(usize::try_from(span.len()).unwrap_or(usize::MAX)));
            self.copy_in(self.gpa(*span), &bytes[done..end]);
            done = end;
        }
        done
    }

    /// Copies the start of `spans`, which are guest memory, to `bytes`.
    pub fn gather(&self, spans: &[Span<Iova>], bytes: &mut [u8]) {
        let mut done = 0;
        for (shared, offset, len) in spans.iter().flat_map(|span| self.pieces(self.gpa(*span))) {
            let Some(shared) = shared else { return };
            let part = len.min(bytes.len() - done);
            shared.copy_to(offset, &mut bytes[done..done + part]);
            done += part;
        }
    }

    /// Copies between a bounce slot and `spans`, starting `position` bytes into them.
    pub fn bounce(&self, spans: &[Span<Iova>], position: u64, slot: &Slot<'_>, to_guest: bool) {
        let (mut skip, mut done) = (position, 0);
        for span in spans {
            if skip >= span.len() {
                skip -= span.len();
                continue;
            }
            let len = (span.len() - skip).min((slot.len - done) as u64);
            let Some(part) = span.slice(skip, len) else { return };
            skip = 0;
            for (shared, offset, len) in self.pieces(self.gpa(part)) {
                let Some(shared) = shared else { return };
                if to_guest {
                    slot.shared.copy_to_shared(slot.offset + done, shared, offset, len);
                } else {
                    shared.copy_to_shared(offset, slot.shared, slot.offset + done, len);
                }
                done += len;
            }
        }
    }

    /// Writes back and invalidates the cache lines of `len` bytes of `spans` from `position` on.
    pub fn flush(&self, spans: &[Span<Iova>], position: u64, len: u64, caches: &dyn CacheFlush) {
        let (mut skip, mut left) = (position, len);
        for span in spans {
            if skip >= span.len() {
                skip -= span.len();
                continue;
            }
            let Some(part) = span.slice(skip, (span.len() - skip).min(left)) else { return };
            skip = 0;
            left -= part.len();
            for (shared, offset, len) in self.pieces(self.gpa(part)) {
                let Some(shared) = shared else { return };
                caches.flush(shared, offset, len);
            }
        }
    }

    /// `span` split at region boundaries: memory, offset in it, length. A piece outside guest memory has no memory and is the
    /// last.
    fn pieces(&self, span: Span<Gpa>) -> impl Iterator<Item = (Option<&SharedMemory>, usize, usize)> {
        let mut rest = Some(span);
        std::iter::from_fn(move || {
            let span = rest.take()?;
            let Some(region) = self.region(span.start()) else { return Some((None, 0, 0)) };
            let offset = region.gpa().offset_of(span.start()).expect("found by this address");
            let len = span.len().min(region.gpa().len() - offset);
            rest = span.slice(len, span.len() - len);
            let fits = |bytes| usize::try_from(bytes).expect("a mapped region fits the address space");
            Some((Some(region.memory()), fits(offset), fits(len)))
        })
    }

    fn region(&self, address: Gpa) -> Option<&Region> {
        let tables = std::iter::once(&self.table).chain(&self.previous);
        tables.flat_map(|table| table.regions()).find(|region| region.gpa().contains(address)).map(|region| &**region)
    }
}

/// The regions of `table`, sorted, adjacent ones merged: their IOVAs are contiguous, so a buffer may cross the boundary.
fn ranges(table: &MemTable) -> Vec<Span<Gpa>> {
    let mut ranges: Vec<Span<Gpa>> = Vec::new();
    for span in table.regions().iter().map(|region| region.gpa()) {
        match ranges.last_mut() {
            Some(last) if last.last().checked_add(1) == Some(span.start()) => {
                *last = Span::inclusive(last.start(), span.last()).expect("sorted and disjoint");
            }
            _ => ranges.push(span),
        }
    }
    ranges
}

/// Part of a bounce buffer in this process.
pub struct Slot<'a> {
    /// The whole buffer.
    pub shared: &'a SharedMemory,
    /// Start of the slot, bytes.
    pub offset: usize,
    /// Length, bytes.
    pub len: usize,
}
