//! The entries of a packed ring's record as lists: the free entries, and those of each chain. The `next` of the record is
//! repeated here, so that it is written and never read.
//!
//! The order of the list changes rarely. So what a chain writes that starts at an entry is prepared whenever that order changes.

use std::iter::successors;

use zerocopy::FromZeros;

use super::packed_layout::{NEXT, Words};
use super::packed_recovery::PackedEntry;
use super::recorded::{FreeHeads, Recorded};
use crate::sys::SharedMemory;

/// Entries of the longest chain that is prepared.
const LONGEST: usize = 3;

/// As long as a number of an entry has values, and a chain more, so that an index needs no comparison. Pages beyond the last
/// entry are never touched.
pub(super) type PerEntry<T> = Box<[T; (1 << u16::BITS) + LONGEST]>;

pub(super) fn per_entry<T: FromZeros>() -> PerEntry<T> {
    let all = <[T]>::new_box_zeroed_with_elems((1 << u16::BITS) + LONGEST).expect("memory for a list");
    all.try_into().unwrap_or_else(|_| unreachable!("as long as the type says"))
}

/// `inflight`, set, `next`, `last` and `num` of the first entry of a chain.
#[inline]
pub(super) fn links(next: u16, last: u16, num: u16) -> u64 {
    1 | u64::from(next) << 16 | u64::from(last) << 32 | u64::from(num) << 48
}

/// What is known of an entry. Its size is that of an entry of the record, so that both have the same offsets.
#[derive(Clone, Copy, FromZeros)]
#[repr(align(32))]
struct Prepared {
    /// Its successor, in its list or chain: as the free heads are when a chain that ends here has been taken.
    next: FreeHeads,
    /// The links of a chain of one entry.
    one: u64,
    /// The links of a chain of three that starts here; 0 if the next two entries are not its neighbours.
    three: u64,
}

/// All entries.
pub(super) struct List {
    /// Those of the record.
    array: Words<SharedMemory>,
    prepared: PerEntry<Prepared>,
}

impl List {
    /// With the successors of `record`.
    pub(super) fn new(array: Words<SharedMemory>, record: &[PackedEntry]) -> Self {
        let mut list = Self { array, prepared: per_entry() };
        (0..).zip(record).for_each(|(entry, found)| list.prepare(entry, found.next));
        list
    }

    /// The entries of the record.
    #[inline]
    pub(super) fn array(&self) -> &Words<SharedMemory> {
        &self.array
    }

    /// The successor of an entry.
    #[inline]
    pub(super) fn next(&self, entry: u16) -> FreeHeads {
        self.prepared[usize::from(entry)].next
    }

    /// The links of a chain of `N` entries that starts at `head`, and the successor of its last. `None` if they are not
    /// neighbours.
    #[inline(always)]
    pub(super) fn neighbours<const N: usize>(&self, head: u16) -> Option<(u64, FreeHeads)> {
        const { assert!(N == 1 || N == LONGEST) };
        let head = usize::from(head);
        let Prepared { one, three, .. } = self.prepared[head];
        let links = if N == 1 { one } else { three };
        (N == 1 || links != 0).then(|| (links, self.prepared[head + N - 1].next))
    }

    /// Writes the successor of an entry.
    pub(super) fn set_next(&mut self, entry: u16, next: u16) {
        self.prepare(entry, next);
        self.array.write_part::<u16, NEXT>(entry.into(), next);
    }

    fn prepare(&mut self, entry: u16, next: u16) {
        let prepared = &mut self.prepared[usize::from(entry)];
        prepared.next = FreeHeads::both(next);
        prepared.one = links(next, entry, 1);
        self.prepare_three(entry);
        if let Some(before) = entry.checked_sub(1) {
            self.prepare_three(before);
        }
    }

    fn prepare_three(&mut self, entry: u16) {
        let (second, third) = (entry.wrapping_add(1), entry.wrapping_add(2));
        let neighbours = self.next(entry).entry() == second && self.next(second).entry() == third;
        self.prepared[usize::from(entry)].three = if neighbours { links(second, third, 3) } else { 0 };
    }

    /// Puts chains before `free`, in their order. Chains that are returned in the order in which they were taken follow each
    /// other already. Returns the first entry.
    #[inline]
    pub(super) fn insert(&mut self, chains: &[Recorded], free: u16) -> u16 {
        let (Some(first), Some(last)) = (chains.first(), chains.last()) else { return free };
        // Without a branch, so that the compiler does several at a time.
        let differences = chains.windows(2).fold(0, |all, pair| all | pair[0].after() ^ pair[1].first());
        if differences != 0 {
            chains.windows(2).for_each(|pair| self.link(pair[0], pair[1].first()));
        }
        self.link(*last, free);
        first.first()
    }

    /// Lets `next` follow a chain. One without an end is a bug in this program: it panics, and does not walk for ever.
    #[inline]
    fn link(&mut self, chain: Recorded, next: u16) {
        let (first, end) = (chain.first(), chain.after());
        if end == next {
            return;
        }
        let mut entries = successors(Some(first), |&entry| Some(self.next(entry).entry())).take(self.prepared.len());
        let last = entries.find(|&entry| self.next(entry).entry() == end);
        let last = last.unwrap_or_else(|| panic!("the chain of entry {first} does not end before entry {end}"));
        self.set_next(last, next);
    }
}
