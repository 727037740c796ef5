//! Guest memory during a batch of requests of the fast shape. What the last look-up of a kind has found is tried first, and is kept as
//! a reference: so a hit costs the comparison alone.

use super::GuestMemoryView;
use super::window::{Window, window_of, window_of_words};
use crate::addr::{Gpa, Iova, IovaSlice, Span};
use crate::sys::{SharedArray, SharedMemory};

/// See the top of this file.
pub struct BatchView<'g> {
    windows: &'g [Window],
    ranges: &'g [Span<Gpa>],
    slice: IovaSlice,
    table: &'g Window,
    header: &'g Window,
    data: Span<Gpa>,
    table_hint: &'g mut usize,
    header_hint: &'g mut usize,
    data_hint: &'g mut usize,
    status_hint: &'g mut usize,
}

impl GuestMemoryView {
    /// The same memory for a batch of requests. `None` if there is none.
    #[inline]
    pub fn batch(&mut self) -> Option<BatchView<'_>> {
        let Self { windows, ranges, slice, table_hint, header_hint, data_hint, status_hint, .. } = self;
        Some(BatchView {
            slice: *slice,
            table: windows.get(*table_hint).or(windows.first())?,
            header: windows.get(*header_hint).or(windows.first())?,
            data: *ranges.get(*data_hint).or(ranges.first())?,
            windows,
            ranges,
            table_hint,
            header_hint,
            data_hint,
            status_hint,
        })
    }
}

impl<'g> BatchView<'g> {
    /// The `entries` descriptors at `address`. `None` unless they lie in one region and are aligned to 8 bytes.
    #[inline(always)]
    pub fn descriptors(&mut self, address: Gpa, entries: u16) -> Option<SharedArray<&'g SharedMemory, u64, 2>> {
        loop {
            match self.table.words(address, entries.into()) {
                Some(table) => return Some(table),
                None => self.table = window_of_words(self.windows, address, entries.into(), self.table_hint)?,
            }
        }
    }

    /// Type and sector of the request header at `address` (virtio 1.2 §5.2.6). `None` unless it lies in one region and is
    /// aligned to 8 bytes, and the byte at `status` is guest memory.
    #[inline(always)]
    pub fn header_and_status(&mut self, address: Gpa, status: Gpa) -> Option<(u32, u64)> {
        let header = loop {
            match self.header.words(address, 1) {
                Some(header) => break header,
                None => self.header = window_of_words(self.windows, address, 1, self.header_hint)?,
            }
        };
        // Drivers keep the two together, so the region of the header is tried first.
        if self.header.offset(status, 1).is_none() {
            window_of(self.windows, status, 1, self.status_hint)?;
        }
        let [front, sector] = header.read(0);
        Some((u32::try_from(front & 0xffff_ffff).expect("masked"), sector))
    }

    /// The IOVA of a data buffer, if all of it is guest memory and it is not empty.
    #[inline(always)]
    pub fn data(&mut self, start: Gpa, len: u32) -> Option<Span<Iova>> {
        let span = loop {
            match self.data.slice_at(start, len.into()) {
                Some(span) => break span,
                None => self.data = self.range_of(start, len)?,
            }
        };
        Some(self.slice.iova(span))
    }

    /// The range that contains the `len` bytes at `start`.
    #[cold]
    fn range_of(&mut self, start: Gpa, len: u32) -> Option<Span<Gpa>> {
        *self.data_hint = self.ranges.partition_point(|range| range.start() <= start).checked_sub(1)?;
        Some(self.ranges[*self.data_hint]).filter(|range| range.slice_at(start, len.into()).is_some())
    }
}
