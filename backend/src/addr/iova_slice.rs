//! Where a guest's memory is in the device's address space. This is the only translation between the two kinds of address.

use super::{Address, Gpa, Iova, Span};

/// The last IOVA of buffers, and of guest memory if there are several guests. AMD-Vi reports 64 bits of addresses but cannot map
/// the highest. Every IOMMU page table of the kernel covers 47 bits.
pub const LAST_IOVA: Iova = Iova((1 << 47) - 1);

/// Slices start at multiples of the largest IOMMU page, so that memory in each can be mapped with as large pages as in the first.
const UNIT: u64 = 1 << 30;

/// The part of the device's address space that one guest's memory has: IOVA = GPA + its start. Two guests have the same guest
/// physical addresses, and one device serves both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaSlice {
    start: Iova,
    last: Iova,
}

impl Default for IovaSlice {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl IovaSlice {
    /// The whole address space, for a device with one guest: IOVA = GPA.
    pub const WHOLE: Self = Self { start: Iova(0), last: Iova(u64::MAX) };

    /// The first IOVA.
    #[must_use]
    pub fn start(self) -> Iova {
        self.start
    }

    /// Bytes; `u64::MAX` for [`Self::WHOLE`].
    #[must_use]
    pub fn size(self) -> u64 {
        (self.last.0 - self.start.0).saturating_add(1)
    }

    /// Where guest memory at `gpa` is mapped; `None` if it does not fit. This does not check that the IOMMU allows it.
    #[must_use]
    pub fn place(self, gpa: Span<Gpa>) -> Option<Span<Iova>> {
        let iova = Span::new(self.start.checked_add(gpa.start().0)?, gpa.len())?;
        (iova.last() <= self.last).then_some(iova)
    }

    /// The IOVA range of guest memory that lies in what [`Self::place`] has placed. This does not check that it is mapped; the
    /// memory table does.
    #[inline]
    #[must_use]
    pub fn iova(self, gpa: Span<Gpa>) -> Span<Iova> {
        Span { start: Iova(self.start.0 + gpa.start.0), len: gpa.len }
    }

    /// The guest physical range that [`Self::iova`] has translated.
    #[inline]
    #[must_use]
    pub fn gpa(self, iova: Span<Iova>) -> Span<Gpa> {
        Span { start: Gpa(iova.start.0 - self.start.0), len: iova.len }
    }

    /// Divides the address space, of which the IOMMU allows `allowed` (sorted), among `count` guests. The first slice starts at 0
    /// and may contain ranges that are not allowed, as the whole address space may. The others lie wholly inside a range that is,
    /// all have one size, the largest possible, and are placed from the top down. The topmost GiB is left to the driver's own
    /// buffers. `None` if there is less than 1 GiB for each.
    #[must_use]
    pub fn divide(allowed: &[Span<Iova>], count: usize) -> Option<Vec<Self>> {
        let others = count.checked_sub(1)?;
        if others == 0 {
            return Some(vec![Self::WHOLE]);
        }
        let mut ranges: Vec<_> = allowed.iter().filter_map(whole_units).collect();
        ranges.last_mut()?.1 -= 1;
        let units = ranges.iter().map(|(first, end)| end - first).sum::<u64>();
        let (size, mut starts) =
            (1..=units).rev().find_map(|size| Some((size, place_from_top(&ranges, others, size)?)))?;
        let lowest = starts.iter().copied().min()?;
        starts.sort_unstable();
        let slice = |start: u64, units: u64| Self { start: Iova(start * UNIT), last: Iova((start + units) * UNIT - 1) };
        Some(std::iter::once(slice(0, lowest)).chain(starts.into_iter().map(|start| slice(start, size))).collect())
    }
}

/// The units that lie wholly inside `range`: the first, and the one after the last.
fn whole_units(range: &Span<Iova>) -> Option<(u64, u64)> {
    let end = range.last().min(LAST_IOVA).0.checked_add(1)? / UNIT;
    let first = range.start().0.div_ceil(UNIT);
    (first < end).then_some((first, end))
}

/// The starts of `count` slices of `size` units in `ranges`, above a first slice of at least that size.
fn place_from_top(ranges: &[(u64, u64)], count: usize, size: u64) -> Option<Vec<u64>> {
    let mut starts = Vec::new();
    for (first, end) in ranges.iter().rev() {
        let lowest = (*first).max(size);
        let mut end = *end;
        while starts.len() < count && end >= lowest + size {
            end -= size;
            starts.push(end);
        }
    }
    (starts.len() == count).then_some(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn span(start: u64, len: u64) -> Span<Gpa> {
        Span::new(Gpa(start), len).unwrap()
    }

    /// What an IOMMU of x86 with so many address bits allows: all but the MSI window.
    fn allowed(bits: u32) -> [Span<Iova>; 2] {
        let inclusive = |first, last| Span::inclusive(Iova(first), Iova(last)).unwrap();
        [inclusive(0, 0xfedf_ffff), inclusive(0xfef0_0000, u64::MAX >> (64 - bits))]
    }

    fn divide(bits: u32, count: usize) -> Vec<(u64, u64)> {
        let slices = IovaSlice::divide(&allowed(bits), count).unwrap();
        slices.iter().map(|slice| (slice.start().0 / GIB, slice.size() / GIB)).collect()
    }

    #[test]
    fn a_single_guest_has_the_whole_address_space_at_its_own_addresses() {
        let slices = IovaSlice::divide(&allowed(39), 1).unwrap();

        assert_eq!(slices, [IovaSlice::WHOLE]);
        assert_eq!(slices[0].place(span(u64::MAX, 1)), Span::new(Iova(u64::MAX), 1));
    }

    #[test]
    fn two_guests_with_39_bits_have_half_each_but_for_the_buffers() {
        assert_eq!(divide(39, 2), [(0, 256), (256, 255)]);
        assert_eq!(divide(39, 4), [(0, 130), (130, 127), (257, 127), (384, 127)]);
    }

    #[test]
    fn no_slice_reaches_above_the_addresses_that_every_page_table_has() {
        for bits in [47, 48, 57, 64] {
            assert_eq!(divide(bits, 2), [(0, 65536), (65536, 65535)], "{bits} bits");
        }
    }

    #[test]
    fn slices_after_the_first_lie_in_one_allowed_range_and_none_overlaps() {
        let hole = Span::new(Iova(300 * GIB), GIB).unwrap();
        let low = Span::inclusive(Iova(0), Iova(300 * GIB - 1)).unwrap();
        let high = Span::inclusive(Iova(301 * GIB), Iova(512 * GIB - 1)).unwrap();
        for count in 2..9 {
            let slices = IovaSlice::divide(&[low, high], count).unwrap();
            let spans: Vec<_> = slices.iter().map(|slice| Span::new(slice.start(), slice.size()).unwrap()).collect();
            assert_eq!(spans.len(), count);
            assert!(spans.windows(2).all(|pair| pair[0].last() < pair[1].start()), "{spans:?}");
            assert!(spans[1..].iter().all(|span| !span.overlaps(&hole)), "{spans:?}");
            assert!(spans[0].len() >= spans[1].len(), "{spans:?}");
        }
    }

    #[test]
    fn too_little_address_space_is_not_divided() {
        assert_eq!(divide(32, 2), [(0, 1), (1, 1)]);
        assert_eq!(IovaSlice::divide(&allowed(32), 3), None);
        assert_eq!(IovaSlice::divide(&[], 2), None);
    }

    #[test]
    fn memory_outside_the_slice_is_not_placed_and_the_translation_has_an_inverse() {
        let slice = IovaSlice::divide(&allowed(39), 2).unwrap()[1];
        let memory = span(4 * GIB, 251 * GIB);

        let placed = slice.place(memory).unwrap();

        assert_eq!(placed, Span::new(Iova(260 * GIB), 251 * GIB).unwrap());
        assert_eq!((slice.iova(memory), slice.gpa(placed)), (placed, memory));
        assert_eq!(slice.place(span(4 * GIB, 251 * GIB + 1)), None);
        assert_eq!(slice.place(span(u64::MAX, 1)), None);
    }
}
