//! Physical Region Pages: how a command names its buffer, and how much of a list of buffers one command can name.
//!
//! Pure arithmetic. A PRP names one page; only the first may start inside its page, at a multiple of four bytes, and only
//! the last may end early (NVMe 2.0 §4.1.1). So a list of buffers can be named as long as each *seam* between two of
//! them is either no seam at all (the next begins where the last one ended) or falls on page boundaries on both sides:
//!
//! ```text
//! |....####|########|##......|      one buffer, or two that touch: 3 entries
//! |....####|  |########|            ends at a page end, starts at a page start: 2 entries
//! |....###.|  |########|            a hole: not one command
//! ```

use super::regs::PAGE;
use crate::addr::{Address, Iova, Span};
use crate::driver::Extent;

/// Entries that fit one PRP list page. A list of just this length needs no pointer to a further page.
const LIST_ENTRIES: u32 = 512;
/// The longest transfer that PRP1 and one list page can name whatever its offset in the first page, bytes.
pub(super) const MAX_LISTED: u32 = LIST_ENTRIES * 4096;

/// What bounds a command.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Logical block, bytes; a power of two.
    pub block: u32,
    /// Longest transfer, bytes; a multiple of `block`, at most 2 MiB.
    pub transfer: u32,
}

/// The parts of `buffers` from `position` bytes on. Nothing if the position lies outside.
pub(super) fn parts(buffers: &[Span<Iova>], position: u64) -> impl Iterator<Item = Span<Iova>> {
    let mut skip = position;
    buffers.iter().filter_map(move |buffer| {
        let part = buffer.slice(skip, buffer.len().saturating_sub(skip));
        skip = skip.saturating_sub(buffer.len());
        part
    })
}

/// The address just after a span; `None` at the top of the address space, where nothing can follow.
#[inline]
fn end(span: &Span<Iova>) -> Option<u64> {
    span.last().raw().checked_add(1)
}

/// True if a command can go on from `before` into `after`.
#[inline]
fn seam_is_legal(before: &Span<Iova>, after: &Span<Iova>) -> bool {
    let touches = end(before) == Some(after.start().raw());
    let on_pages = after.start().is_aligned(PAGE) && end(before).is_none_or(|end| end.is_multiple_of(PAGE));
    touches || on_pages
}

/// How much of `buffers` from `position` on the next command can take; see [`crate::driver::Queue::extent`].
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
    let rest = parts(buffers, position).fold(0_u64, |sum, part| sum.saturating_add(part.len()));
    let bounced = whole_blocks(rest, bounce_limit.min(limits.transfer));
    debug_assert!(bounced != 0, "less than a block at {position} of {buffers:?}, bounce limit {bounce_limit}");
    Extent { bytes: bounced, direct: false, listed: false }
}

/// True if PRPs can name `bytes` bytes from `position` on.
#[inline]
pub(super) fn fit(buffers: &[Span<Iova>], position: u64, bytes: u32) -> bool {
    direct_prefix(buffers, position, bytes) >= bytes.into()
}

/// Bytes from `position` on that PRPs can name; stops looking once there are `enough`.
#[inline]
fn direct_prefix(buffers: &[Span<Iova>], position: u64, enough: u32) -> u64 {
    if let ([only], 0) = (buffers, position) {
        return if only.start().is_aligned(4) { only.len() } else { 0 };
    }
    direct_parts(buffers, position, enough)
}

/// [`direct_prefix`] of any list, from any position.
fn direct_parts(buffers: &[Span<Iova>], position: u64, enough: u32) -> u64 {
    let mut parts = parts(buffers, position);
    let Some(mut last) = parts.next().filter(|first| first.start().is_aligned(4)) else {
        return 0;
    };
    let mut bytes = last.len();
    while bytes < u64::from(enough) {
        let Some(next) = parts.next().filter(|next| seam_is_legal(&last, next)) else {
            break;
        };
        bytes = bytes.saturating_add(next.len());
        last = next;
    }
    bytes
}

/// The two PRP fields of a command for `bytes` bytes of `buffers` from `position` on. Entries beyond the second go to
/// the list at `list`, through `put(index, entry)`.
///
/// The bytes must be a direct [`extent`] or contiguous and page-aligned; no entry is made for memory outside `buffers`.
///
/// # Panics
/// If one list page is not enough: the caller ignored [`Limits::transfer`].
#[inline]
pub fn build(buffers: &[Span<Iova>], position: u64, bytes: u32, list: Iova, put: impl FnMut(u32, u64)) -> (u64, u64) {
    if let ([only], 0) = (buffers, position) {
        let (start, bytes) = (only.start().raw(), u64::from(bytes));
        let first = PAGE - (start & (PAGE - 1));
        if bytes <= first + PAGE && bytes <= only.len() {
            return (start, if bytes <= first { 0 } else { start + first });
        }
    }
    build_parts(buffers, position, bytes, list, put)
}

/// [`build`] of any list, from any position.
fn build_parts(
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
            // A third entry: the second was the first of a list after all.
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
    for part in parts(buffers, position) {
        let Some(part) = part.slice(0, part.len().min(left)) else {
            break;
        };
        left -= part.len();
        // A part that begins inside a page goes on where the one before it ended: that page has its entry.
        if first || part.start().is_aligned(PAGE) {
            entry(part.start().raw());
        }
        first = false;
        // None follows the last page of the address space.
        let after = |address: u64| (address | (PAGE - 1)).checked_add(1).filter(|next| *next <= part.last().raw());
        let mut next = after(part.start().raw());
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
