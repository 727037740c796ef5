//! The bytes of a chain: which are its header, its data and its status, whatever the boundaries of its descriptors.

use super::types::{HEADER, RequestFault};
use crate::addr::{Gpa, Iova, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::chain::Chain;

/// Cannot overflow: there are at most 2048 lengths of 32 bits each.
#[inline]
pub(super) fn total(spans: &[Span<Gpa>]) -> u64 {
    spans.iter().map(Span::len).sum()
}

/// Collects the writable bytes except the last, which is the status.
#[inline]
pub(super) fn collect_writable(
    chain: &Chain,
    guest: &mut GuestMemoryView,
    buffers: &mut Vec<Span<Iova>>,
) -> Result<u64, RequestFault> {
    let Some((last, whole)) = chain.writable().split_last() else { return Ok(0) };
    let mut bytes = collect(whole.iter().copied(), guest, buffers)?;
    if let Some(cut) = last.slice(0, last.len() - 1) {
        bytes += collect([cut].into_iter(), guest, buffers)?;
    }
    Ok(bytes)
}

/// Collects the readable bytes after the header.
#[inline]
pub(super) fn collect_readable(
    chain: &Chain,
    guest: &mut GuestMemoryView,
    buffers: &mut Vec<Span<Iova>>,
) -> Result<u64, RequestFault> {
    let mut header = HEADER;
    let data = chain.readable().iter().filter_map(|span| {
        let skip = header.min(span.len());
        header -= skip;
        span.slice(skip, span.len() - skip)
    });
    collect(data, guest, buffers)
}

#[inline]
fn collect(
    spans: impl Iterator<Item = Span<Gpa>>,
    guest: &mut GuestMemoryView,
    buffers: &mut Vec<Span<Iova>>,
) -> Result<u64, RequestFault> {
    let mut bytes = 0;
    for span in spans {
        let found = guest.data(span).ok_or(RequestFault::Memory { start: span.start(), len: span.len() })?;
        buffers.push(found);
        bytes += span.len();
    }
    Ok(bytes)
}
