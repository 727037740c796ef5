//! The entries of a packed ring's record as lists: the free entries, and those of each chain. The `next` of the record is repeated
//! here, so that it is written and never read.
//!
//! The order of the list changes rarely. So what a chain writes that starts at an entry is prepared whenever it changes.

use std::iter::successors;

use zerocopy::FromZeros;

use super::packed::Words;
use super::packed_layout::NEXT;
use super::packed_recovery::PackedEntry;
use crate::sys::SharedMemory;

/// Entries of the longest chain that is prepared.
const LONGEST: usize = 3;

/// As long as a number of an entry has values, and a chain more, so that an index needs no comparison. Pages beyond the last entry
/// are never touched.
pub(super) type PerEntry<T> = Box<[T; (1 << u16::BITS) + LONGEST]>;

pub(super) fn per_entry<T: FromZeros>() -> PerEntry<T> {
    let all = <[T]>::new_box_zeroed_with_elems((1 << u16::BITS) + LONGEST).expect("memory for a list");
    all.try_into().unwrap_or_else(|_| unreachable!("as long as the type says"))
}

/// `free_head` and `old_free_head` of the record, which are neighbours there.
#[derive(Clone, Copy, FromZeros)]
pub(super) struct FreeHeads(u32);

impl FreeHeads {
    #[inline]
    pub(super) fn new(head: u16, old: u16) -> Self {
        Self(u32::from(head) | u32::from(old) << 16)
    }

    /// As they are between publications.
    #[inline]
    pub(super) fn both(entry: u16) -> Self {
        Self::new(entry, entry)
    }

    /// The free head.
    #[inline]
    pub(super) fn entry(self) -> u16 {
        u16::try_from(self.0 & 0xffff).expect("masked")
    }

    #[inline]
    pub(super) fn word(self) -> u32 {
        self.0
    }
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
    /// For the first entry of each chain, the successor of the last.
    ends: PerEntry<u16>,
}

impl List {
    /// With the successors of `record`.
    pub(super) fn new(array: Words<SharedMemory>, record: &[PackedEntry]) -> Self {
        let mut list = Self { array, prepared: per_entry(), ends: per_entry() };
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

    /// The links of a chain of `N` entries that starts at `head`, and the successor of its last. `None` if they are not neighbours.
    #[inline(always)]
    pub(super) fn neighbours<const N: usize>(&self, head: u16) -> Option<(u64, FreeHeads)> {
        const { assert!(N == 1 || N == LONGEST) };
        let head = usize::from(head);
        let Prepared { one, three, .. } = self.prepared[head];
        let links = if N == 1 { one } else { three };
        (N == 1 || links != 0).then(|| (links, self.prepared[head + N - 1].next))
    }

    /// The chain that starts at `head` is followed by `next`.
    #[inline]
    pub(super) fn set_end(&mut self, head: u16, next: u16) {
        self.ends[usize::from(head)] = next;
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

    /// Puts chains, by their first entries, before `free`, in their order: chains that are returned in the order in which they were
    /// taken follow each other already. Returns the first entry.
    #[inline]
    pub(super) fn insert(&mut self, chains: &[u16], free: u16) -> u16 {
        let Some((&first, others)) = chains.split_first() else { return free };
        let mut before = first;
        let mut follow = |next: u16| {
            if self.ends[usize::from(before)] != next {
                self.link(before, next);
            }
            before = next;
        };
        // Eight at a time: most of the instructions of a plain loop would count and compare.
        let (eights, rest) = others.as_chunks::<8>();
        eights.iter().for_each(|eight| eight.iter().for_each(|&chain| follow(chain)));
        rest.iter().for_each(|&chain| follow(chain));
        follow(free);
        first
    }

    /// Lets `next` follow the chain from `head`. A chain without its end is a bug in this program: it panics, and does not walk for
    /// ever.
    #[inline]
    fn link(&mut self, head: u16, next: u16) {
        let end = self.ends[usize::from(head)];
        let mut chain = successors(Some(head), |&entry| Some(self.next(entry).entry())).take(self.prepared.len());
        let last = chain.find(|&entry| self.next(entry).entry() == end);
        let last = last.unwrap_or_else(|| panic!("the chain of entry {head} does not end before entry {end}"));
        self.set_next(last, next);
    }
}
