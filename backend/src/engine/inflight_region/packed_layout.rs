//! Where the fields of a packed ring's record are.

use std::mem::offset_of;

use zerocopy::{FromBytes, IntoBytes};

use super::InflightRegion;
use super::packed_recovery::{PackedEntry, PackedRecord};
use crate::sys::SharedArray;

/// Header and entries are four words.
pub(super) type Words<O> = SharedArray<O, u64, 4>;

/// vhost-user: `QueueRegionPacked`, without its array.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    features: u64,
    version: u16,
    desc_num: u16,
    free_head: u16,
    old_free_head: u16,
    used_idx: u16,
    old_used_idx: u16,
    used_wrap_counter: u8,
    old_used_wrap_counter: u8,
    padding: [u8; 7],
    /// The array is aligned to 8 bytes.
    alignment: [u8; 3],
}

/// vhost-user: `DescStatePacked`.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Entry {
    inflight: u8,
    padding: u8,
    next: u16,
    last: u16,
    num: u16,
    counter: u64,
    id: u16,
    flags: u16,
    len: u32,
    addr: u64,
}

/// Bytes before the array.
pub(super) const HEADER: usize = size_of::<Header>();
/// Bytes of one entry.
pub(super) const ENTRY: usize = size_of::<Entry>();
const _: () = assert!(HEADER == 32 && ENTRY == 32);

// Words of the header.
/// Version, number of entries and both free heads.
pub(super) const FREE: usize = 1;
/// Both free heads, in bytes.
pub(super) const FREE_HEADS: usize = offset_of!(Header, free_head);
/// Both used positions, in bytes.
pub(super) const USED: usize = offset_of!(Header, used_idx);
const _: () = assert!(offset_of!(Header, version) == 8 && offset_of!(Header, desc_num) == 10);
const _: () = assert!(offset_of!(Header, free_head) == 12 && offset_of!(Header, old_free_head) == 14);
const _: () = assert!(offset_of!(Header, used_idx) == 16 && offset_of!(Header, old_used_idx) == 18);
const _: () = assert!(offset_of!(Header, used_wrap_counter) == 20 && offset_of!(Header, old_used_wrap_counter) == 21);

// Of an entry.
/// The word of `inflight`, `next`, `last` and `num`.
pub(super) const LINKS: usize = 0;
/// The word of the counter.
pub(super) const COUNTER: usize = 1;
/// The word of ID, flags and length: the second word of a ring's descriptor, with its halves exchanged. The address follows.
pub(super) const REST: usize = 2;
/// In bytes.
pub(super) const INFLIGHT: usize = offset_of!(Entry, inflight);
/// In bytes.
pub(super) const NEXT: usize = offset_of!(Entry, next);
const _: () = assert!(INFLIGHT == 0 && NEXT == 2 && offset_of!(Entry, last) == 4 && offset_of!(Entry, num) == 6);
const _: () =
    assert!(offset_of!(Entry, counter) == 8 * COUNTER && offset_of!(Entry, id) == 16 && offset_of!(Entry, flags) == 18);
const _: () = assert!(offset_of!(Entry, len) == 20 && offset_of!(Entry, addr) == 24);

/// Offset of an entry.
#[inline]
pub(super) fn at(entry: u16) -> usize {
    HEADER + ENTRY * usize::from(entry)
}

/// Reads the whole record, each value once.
pub(super) fn read(region: &InflightRegion) -> PackedRecord {
    let header: Header = region.memory.read(0);
    let entry = |index| {
        let Entry { inflight, next, last, num, counter, id, flags, len, addr, .. } = region.memory.read(at(index));
        PackedEntry { inflight, next, last, num, counter, id, flags, len, addr }
    };
    let entries = (0..region.entries).map(entry).collect();
    PackedRecord {
        features: header.features,
        version: header.version,
        desc_num: header.desc_num,
        free_head: header.free_head,
        old_free_head: header.old_free_head,
        used_idx: header.used_idx,
        old_used_idx: header.old_used_idx,
        used_wrap_counter: header.used_wrap_counter,
        old_used_wrap_counter: header.old_used_wrap_counter,
        entries,
    }
}
