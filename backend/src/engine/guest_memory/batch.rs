//! Guest memory during a batch of requests of the fast shape. What the last look-up of a kind has found is tried first, and
//! is kept as a reference, so a hit costs the comparison alone. A miss looks for what contains the address, and starts over:
//! if the two ways joined, the compiler would check the bounds again where they do.

use super::window::{Window, window_of, window_of_words};
use super::{GuestMemoryView, Hints, Regions};
use crate::addr::{Gpa, Iova, IovaSlice, Span};
use crate::sys::{Line, SharedArray, SharedMemory};

/// See the top of this file.
pub struct BatchView<'g> {
    regions: &'g Regions,
    hints: &'g mut Hints,
    slice: IovaSlice,
    table: &'g Window,
    header: &'g Window,
    status: &'g Window,
    /// Where the last indirect table was.
    pub table_line: Line,
    data: Span<Gpa>,
}

impl GuestMemoryView {
    /// The same memory for a batch of requests. `None` if there is none.
    #[inline]
    pub fn batch(&mut self) -> Option<BatchView<'_>> {
        let Self { regions, hints, slice, .. } = self;
        let Regions { windows, ranges } = &*regions;
        Some(BatchView {
            slice: *slice,
            table: windows.get(hints.table).or(windows.first())?,
            header: windows.get(hints.header).or(windows.first())?,
            table_line: Line::default(),
            status: windows.get(hints.status).or(windows.first())?,
            data: *ranges.get(hints.data).or(ranges.first())?,
            regions,
            hints,
        })
    }
}

impl<'g> BatchView<'g> {
    /// The `entries` descriptors at `address`. `None` unless they lie in one region and are aligned to 8 bytes.
    #[inline(always)]
    pub fn descriptors(&mut self, address: Gpa, entries: u16) -> Option<SharedArray<&'g SharedMemory, u64, 2>> {
        loop {
            match self.table.words(address, entries.into()) {
                Some(table) => {
                    self.table_line = table.line(0);
                    return Some(table);
                }
                None => {
                    self.table = window_of_words(&self.regions.windows, address, entries.into(), &mut self.hints.table)?
                }
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
                None => self.header = window_of_words(&self.regions.windows, address, 1, &mut self.hints.header)?,
            }
        };
        // Drivers keep the two together, so the region of the header is tried first.
        if self.header.offset(status, 1).is_none() {
            window_of(&self.regions.windows, status, 1, &mut self.hints.status)?;
        }
        let [front, sector] = header.read(0);
        Some((u32::try_from(front & 0xffff_ffff).expect("masked"), sector))
    }

    /// Writes a status byte. Returns false without effect if it is not guest memory, or that of the former table.
    #[inline(always)]
    pub fn write_status(&mut self, address: Gpa, status: u8) -> bool {
        loop {
            if let Some(offset) = self.status.offset(address, 1) {
                self.status.memory.write_u8(offset, status);
                return true;
            }
            match window_of(&self.regions.windows, address, 1, &mut self.hints.status) {
                Some(window) => self.status = window,
                None => return false,
            }
        }
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
        self.hints.data = self.regions.ranges.partition_point(|range| range.start() <= start).checked_sub(1)?;
        Some(self.regions.ranges[self.hints.data]).filter(|range| range.slice_at(start, len.into()).is_some())
    }
}
