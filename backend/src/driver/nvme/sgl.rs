//! Scatter Gather Lists: describing buffers that PRPs cannot, if the controller supports them (NVMe 2.0 §4.1.2).
//!
//! Pure arithmetic, as in `prp`. Every buffer becomes one data block descriptor of any length, so gaps do not matter. The
//! list must fit the list page of its slot, and some controllers require dword alignment.
//!
//! ```text
//! one buffer:   SQE <- data block
//! more:         SQE <- last segment --> list page: data block, data block, ...
//! ```

use super::prp::{Limits, segments};
use super::regs::PAGE;
use crate::addr::{Address, Iova, Span};

/// Size of a descriptor, bytes. NVMe 2.0 §4.1.2.1
const DESCRIPTOR: u64 = 16;
/// Descriptors in a list page.
const LIST_ENTRIES: usize = (PAGE / DESCRIPTOR) as usize;
/// SGL identifiers, in the last byte of a descriptor: type in bits 7:4, subtype 0h (an address) in bits 3:0.
const DATA_BLOCK: u64 = 0x00 << 56;
const LAST_SEGMENT: u64 = 0x30 << 56;
/// PSDT in the second byte of a submission entry: SGL for data, contiguous metadata buffer. NVMe 2.0 §3.3.3.1
pub(super) const PSDT: u8 = 0b01 << 6;

/// Required alignment of addresses and lengths in SGLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Any address, any length.
    Byte,
    /// Addresses and lengths that are multiples of four bytes.
    Dword,
}

impl Granularity {
    /// From SGLS bits 1:0 of Identify Controller; `None` if SGLs are not supported. NVMe 2.0 §5.17.2.1, bytes 539:536
    pub(super) fn decode(sgls: u32) -> Option<Self> {
        match sgls & 0b11 {
            0b01 => Some(Self::Byte),
            0b10 => Some(Self::Dword),
            _ => None,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::Byte => 1,
            Self::Dword => 4,
        }
    }
}

/// How many bytes of `buffers` from `position` on one SGL can describe: whole blocks, or 0.
#[must_use]
pub fn max_bytes(buffers: &[Span<Iova>], position: u64, limits: Limits, granularity: Granularity) -> u32 {
    let unit = granularity.bytes();
    let mut bytes = 0_u64;
    for segment in segments(buffers, position).take(LIST_ENTRIES) {
        if !segment.start().is_aligned(unit) {
            break;
        }
        bytes = bytes.saturating_add(segment.len());
        // A length that is not a multiple of the unit can only be the last, cut to whole blocks below.
        if !segment.len().is_multiple_of(unit) || bytes >= limits.transfer.into() {
            break;
        }
    }
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(limits.transfer);
    bytes - bytes % limits.block
}

/// The data pointer of a command for `bytes` bytes of `buffers` from `position` on, at most [`max_bytes`], and the number of
/// descriptors in the list. `put(index, words)` writes them to the page at `list`; a single buffer needs no list.
pub fn build(
    buffers: &[Span<Iova>],
    position: u64,
    bytes: u32,
    list: Iova,
    mut put: impl FnMut(usize, [u64; 2]),
) -> ([u64; 2], usize) {
    let mut left = u64::from(bytes);
    let mut first = None;
    let mut count = 0;
    for segment in segments(buffers, position) {
        let Some(segment) = segment.slice(0, segment.len().min(left)) else { break };
        left -= segment.len();
        let descriptor = [segment.start().raw(), segment.len() | DATA_BLOCK];
        assert!(count < LIST_ENTRIES, "{bytes} bytes need more than one SGL page");
        match first {
            None => first = Some(descriptor),
            Some(before) => {
                if count == 1 {
                    put(0, before);
                }
                put(count, descriptor);
            }
        }
        count += 1;
    }
    debug_assert_eq!(left, 0, "{bytes} bytes at {position} of {buffers:?}");
    match first {
        Some(only) if count == 1 => (only, 0),
        _ => ([list.raw(), (count as u64 * DESCRIPTOR) | LAST_SEGMENT], count),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIST: Iova = Iova(0x7000_0000);
    const LIMITS: Limits = Limits { block: 512, transfer: 1 << 20 };

    fn span(start: u64, len: u64) -> Span<Iova> {
        Span::new(Iova(start), len).unwrap()
    }

    /// The spans that a controller accesses.
    fn walk(buffers: &[Span<Iova>], position: u64, bytes: u32) -> Vec<(u64, u64)> {
        let mut list = Vec::new();
        let (pointer, count) = build(buffers, position, bytes, LIST, |index, words| {
            assert_eq!(index, list.len());
            list.push((words[0], words[1]));
        });
        if count == 0 {
            return vec![(pointer[0], pointer[1])];
        }
        assert_eq!(pointer, [LIST.0, (count as u64 * 16) | (0x30 << 56)]);
        assert_eq!(list.len(), count);
        list
    }

    #[test]
    fn one_buffer_needs_no_list_and_several_do() {
        assert_eq!(walk(&[span(0x1001, 4096)], 512, 1024), [(0x1201, 1024)]);
        let two = [span(0x1001, 700), span(0x9003, 324)];
        assert_eq!(walk(&two, 0, 1024), [(0x1001, 700), (0x9003, 324)]);
        assert_eq!(walk(&two, 512, 512), [(0x1201, 188), (0x9003, 324)]);
    }

    #[test]
    fn a_list_never_exceeds_its_page() {
        let many: Vec<_> = (0..300).map(|n| span(0x10_0001 + n * 0x100, 10)).collect();
        assert_eq!(max_bytes(&many, 0, LIMITS, Granularity::Byte), 2560);
        assert_eq!(walk(&many, 0, 2560).len(), 256);
    }

    #[test]
    fn dword_granularity_stops_at_an_odd_address_and_after_an_odd_length() {
        let max_bytes = |buffers: &[Span<Iova>]| max_bytes(buffers, 0, LIMITS, Granularity::Dword);
        assert_eq!(max_bytes(&[span(0x1002, 1024)]), 0);
        assert_eq!(max_bytes(&[span(0x1004, 1024), span(0x8004, 512)]), 1536);
        assert_eq!(max_bytes(&[span(0x1004, 1024), span(0x8001, 512)]), 1024);
        assert_eq!(max_bytes(&[span(0x1004, 1022), span(0x8000, 514)]), 512);
    }

    #[test]
    fn granularity_follows_sgls_bits_1_0() {
        assert_eq!(
            [0, 1, 2, 3].map(Granularity::decode),
            [None, Some(Granularity::Byte), Some(Granularity::Dword), None]
        );
        assert_eq!(Granularity::decode(0xffff_fffc), None);
    }

    proptest! {
        #[test]
        fn every_byte_is_described_once_and_in_order(
            lens in prop::collection::vec(1_u64..3000, 1..400),
            at in any::<prop::sample::Index>(),
        ) {
            let buffers: Vec<_> = lens.iter().zip(0..).map(|(len, n)| span(0x1_0000 * n + 7 * n + 1, *len)).collect();
            let total: u64 = lens.iter().sum();
            prop_assume!(total >= 512);
            let position = at.index((total / 512) as usize) as u64 * 512;
            let bytes = max_bytes(&buffers, position, LIMITS, Granularity::Byte);
            prop_assume!(bytes != 0);
            prop_assert!(bytes.is_multiple_of(512) && bytes <= LIMITS.transfer);
            let named: Vec<u64> = walk(&buffers, position, bytes).iter().flat_map(|&(start, len)| start..start + len).collect();
            let all = buffers.iter().flat_map(|buffer| (0..buffer.len()).map(|i| buffer.start().0 + i));
            let expected: Vec<u64> = all.skip(position as usize).take(bytes as usize).collect();
            prop_assert_eq!(named, expected);
        }
    }
}
