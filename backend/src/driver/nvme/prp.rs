//! Physical Region Pages: describing the data buffers of a command, and how much of a buffer list one command can describe.
//!
//! Pure arithmetic. A PRP entry points to one page. Only the first may start inside its page, at a multiple of four bytes,
//! and only the last may end inside its page (NVMe 2.0 §4.1.1). So two successive buffers fit one command if they are
//! contiguous, or if the first ends and the second starts on a page boundary. Anything else is a *gap*, which ends the
//! command:
//!
//! ```text
//! |....####|########|##......|      one buffer, or contiguous ones: 3 entries
//! |....####|  |########|            page boundary on both sides: 2 entries
//! |....###.|  |########|            a gap: not one command
//! ```

use super::regs::PAGE;
use crate::addr::{Address, Iova, Span};
use crate::driver::Extent;

/// Entries in one PRP list page. A list of exactly this length needs no pointer to a further page.
const LIST_ENTRIES: u32 = 512;
/// The longest transfer that PRP1 and one list page describe at any offset in the first page, bytes.
pub(super) const MAX_TRANSFER: u32 = LIST_ENTRIES * 4096;

/// Limits of one command.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of a logical block, bytes; a power of two.
    pub block: u32,
    /// Longest transfer, bytes; a multiple of `block`, at most 2 MiB.
    pub transfer: u32,
}

/// The segments of `buffers` from `position` bytes on; none if `position` lies outside.
pub(super) fn segments(buffers: &[Span<Iova>], position: u64) -> impl Iterator<Item = Span<Iova>> {
    let mut skip = position;
    buffers.iter().filter_map(move |buffer| {
        let segment = buffer.slice(skip, buffer.len().saturating_sub(skip));
        skip = skip.saturating_sub(buffer.len());
        segment
    })
}

/// The address after a span; `None` if the span ends at the top of the address space.
#[inline]
fn end(span: &Span<Iova>) -> Option<u64> {
    span.last().raw().checked_add(1)
}

/// True if one command can describe `after` behind `before`: there is no gap between them.
#[inline]
fn can_follow(before: &Span<Iova>, after: &Span<Iova>) -> bool {
    let contiguous = end(before) == Some(after.start().raw());
    let on_pages = after.start().is_aligned(PAGE) && end(before).is_none_or(|end| end.is_multiple_of(PAGE));
    contiguous || on_pages
}

/// Implements [`crate::driver::Queue::extent`] for PRPs.
#[inline]
#[must_use]
pub fn extent(buffers: &[Span<Iova>], position: u64, limits: Limits, bounce_limit: u32) -> Extent {
    let whole_blocks = |bytes: u64, limit: u32| {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(limit);
        bytes & !(limits.block - 1)
    };
    let direct = whole_blocks(direct_prefix(buffers, position, limits.transfer), limits.transfer);
    if direct != 0 {
        return Extent { bytes: direct, direct: true, listed: false };
    }
    let rest = segments(buffers, position).fold(0_u64, |sum, segment| sum.saturating_add(segment.len()));
    let bounced = whole_blocks(rest, bounce_limit.min(limits.transfer));
    debug_assert!(bounced != 0, "less than a block at {position} of {buffers:?}, bounce limit {bounce_limit}");
    Extent { bytes: bounced, direct: false, listed: false }
}

/// True if the PRPs of one command can describe `bytes` bytes from `position` on.
#[inline]
pub(super) fn can_describe(buffers: &[Span<Iova>], position: u64, bytes: u32) -> bool {
    direct_prefix(buffers, position, bytes) >= bytes.into()
}

/// Bytes from `position` on that the PRPs of one command can describe; stops counting at `enough`.
#[inline]
fn direct_prefix(buffers: &[Span<Iova>], position: u64, enough: u32) -> u64 {
    if let ([only], 0) = (buffers, position) {
        return if only.start().is_aligned(4) { only.len() } else { 0 };
    }
    direct_prefix_of_list(buffers, position, enough)
}

/// [`direct_prefix`] of any buffer list at any position.
fn direct_prefix_of_list(buffers: &[Span<Iova>], position: u64, enough: u32) -> u64 {
    let mut segments = segments(buffers, position);
    let Some(mut last) = segments.next().filter(|first| first.start().is_aligned(4)) else {
        return 0;
    };
    let mut bytes = last.len();
    while bytes < u64::from(enough) {
        let Some(next) = segments.next().filter(|next| can_follow(&last, next)) else {
            break;
        };
        bytes = bytes.saturating_add(next.len());
        last = next;
    }
    bytes
}

/// The PRP1 and PRP2 fields of a command for `bytes` bytes of `buffers` from `position` on. If a list is needed, `put(index,
/// entry)` writes its entries to the page at `list`.
///
/// The bytes must be a direct [`extent`], or contiguous and page-aligned. No entry points outside `buffers`.
///
/// # Panics
/// If one list page is too small, because the caller ignored [`Limits::transfer`].
#[inline]
pub fn build(buffers: &[Span<Iova>], position: u64, bytes: u32, list: Iova, put: impl FnMut(u32, u64)) -> (u64, u64) {
    if let ([only], 0) = (buffers, position) {
        let whole = only.slice(0, bytes.into()).and_then(|whole| two_entries(whole, MAX_TRANSFER));
        if let Some(entries) = whole {
            return entries;
        }
    }
    build_from_list(buffers, position, bytes, list, put)
}

/// The PRP1 and PRP2 fields of a command for all of `buffer`. `None` if that needs a list, or cannot be described, or is longer
/// than `limit`.
#[inline]
pub(super) fn two_entries(buffer: Span<Iova>, limit: u32) -> Option<(u64, u64)> {
    let (start, bytes) = (buffer.start().raw(), buffer.len());
    let first = PAGE - (start & (PAGE - 1));
    let fits = buffer.start().is_aligned(4) && bytes <= u64::from(limit) && bytes <= first + PAGE;
    fits.then_some((start, if bytes <= first { 0 } else { start + first }))
}

/// [`build`] of any buffer list at any position.
fn build_from_list(
    buffers: &[Span<Iova>],
    position: u64,
    bytes: u32,
    list: Iova,
    mut put: impl FnMut(u32, u64),
) -> (u64, u64) {
    let (mut prp1, mut prp2) = (0, 0);
    let mut count = 0;
    let mut entry = |address: u64| {
        match count {
            0 => prp1 = address,
            1 => prp2 = address,
            // The third entry needs a list: move the second one there.
            2 => {
                put(0, std::mem::replace(&mut prp2, list.raw()));
                put(1, address);
            }
            _ => {
                assert!(count <= LIST_ENTRIES, "{bytes} bytes need more than one PRP list page");
                put(count - 1, address);
            }
        }
        count += 1;
    };
    let mut left = u64::from(bytes);
    let mut first = true;
    for segment in segments(buffers, position) {
        let Some(segment) = segment.slice(0, segment.len().min(left)) else {
            break;
        };
        left -= segment.len();
        // A later segment that starts inside a page is contiguous to the one before it, which has the entry of that page.
        if first || segment.start().is_aligned(PAGE) {
            entry(segment.start().raw());
        }
        first = false;
        // The next page that the segment reaches; none after the last page of the address space.
        let after = |address: u64| (address | (PAGE - 1)).checked_add(1).filter(|next| *next <= segment.last().raw());
        let mut next = after(segment.start().raw());
        while let Some(page) = next {
            entry(page);
            next = after(page);
        }
    }
    debug_assert_eq!(left, 0, "{bytes} bytes at {position} of {buffers:?}");
    (prp1, prp2)
}

#[cfg(test)]
mod tests;
