//! The record of a packed ring: a copy of each descriptor taken. Entries that are not in use form a list.
//!
//! Each group of fields that belongs together is written by one store: both free heads, and both used positions. So a crash never
//! leaves a position with the wrap counter of another.

use super::packed_layout::{COUNTER, FREE, FREE_HEADS, HEADER, INFLIGHT, LINKS, NEXT, REST, USED, read};
use super::packed_recovery::{PackedPlan, PackedRecovery, PackedState, recover};
use super::{Contradiction, InflightRegion, VERSION};
use crate::engine::virtqueue::position::Position;
use crate::sys::{SharedArray, SharedCursor, SharedEntry, SharedMemory};

/// Both are four words.
type Words<O> = SharedArray<O, u64, 4>;

/// Descriptors of the longest chain that [`PackedMarks::note_all`] copies.
const LONGEST: usize = 3;

/// The index of no entry.
const NONE: u16 = u16::MAX;

/// As long as a number of an entry has values, and a chain more, so that an index needs no comparison. Pages beyond the last entry
/// are never touched.
type PerEntry<T> = Box<[T; (1 << u16::BITS) + LONGEST]>;

/// A descriptor as in the ring: address; length, ID and flags.
pub(in crate::engine) type Descriptor = [u64; 2];

/// Marks the requests that a packed ring takes and publishes. It never reads the record: the list of free entries is kept here.
pub(in crate::engine) struct PackedMarks {
    header: SharedEntry<SharedMemory, u64, 4>,
    /// The current entry is the first of the chain noted.
    entries: SharedCursor<u64, 4>,
    /// The text's global counter.
    counter: u64,
    free_head: u16,
    /// [`Self::note`]: the entry of the descriptor noted last.
    noted: u16,
    /// The first free entry after the chain noted.
    after: u16,
    /// How many chains are pushed and not yet published, and which.
    pushed: u16,
    batch: PerEntry<u16>,
    /// For each entry its successor, in the list of free entries or in its chain: the `next` of the record.
    next: PerEntry<u16>,
    /// For the first entry of each chain, the successor of the last.
    ends: PerEntry<u16>,
    /// The position before the next publication.
    used: Position,
}

impl PackedMarks {
    /// Recovers the record of a ring, or initializes it. `state` gets the number of a slot and returns the ring's state with
    /// that slot's flags. `None` if the record must not be used.
    pub(in crate::engine) fn start(
        region: &InflightRegion,
        state: impl FnOnce(u16) -> PackedState,
    ) -> Result<Option<(Self, PackedPlan)>, Contradiction> {
        let mut record = read(region);
        let state = state(record.old_used_idx);
        let plan = match recover(&record, region.entries, &state)? {
            PackedRecovery::Unknown => return Ok(None),
            PackedRecovery::Fresh(used) => {
                initialize(region, used);
                record = read(region);
                PackedPlan::empty(used)
            }
            PackedRecovery::Resume(plan) => plan,
        };
        let mut marks = Self {
            header: words(region, 0, 1).into_owned().into_entry(0),
            entries: words(region, HEADER, region.entries).into_owned().into_cursor(),
            counter: plan.next_counter,
            free_head: plan.free_head,
            noted: plan.free_head,
            after: plan.free_head,
            pushed: 0,
            batch: per_entry([]),
            next: per_entry(record.entries.iter().map(|entry| entry.next)),
            ends: per_entry([]),
            used: plan.used,
        };
        marks.settle(&plan);
        for request in &plan.requests {
            // What follows a chain in flight means nothing. It may even be an entry of the chain, which `link` would stop at.
            let last = record.entries[usize::from(request.entry)].last;
            set_next(&mut marks.next, &marks.entries, last, NONE);
            marks.ends[usize::from(request.entry)] = NONE;
        }
        Ok(Some((marks, plan)))
    }

    /// Writes what the recovery has decided. Killed in between, the next recovery decides the same: a publication that is
    /// completed has its old position until last, one that is rolled back has its new free head until last.
    fn settle(&mut self, plan: &PackedPlan) {
        let (free, used) = (self.free_head, self.used);
        if plan.completed {
            self.set_free(free, free);
            self.set_used(used, used);
        } else {
            self.set_used(used, used);
            self.set_free(free, free);
        }
        plan.stale.iter().for_each(|&entry| self.clear(entry));
    }

    /// The entry that the next chain starts at.
    #[inline]
    pub(in crate::engine) fn next_entry(&self) -> u16 {
        self.free_head
    }

    /// Copies the next descriptor of a chain, as it was read from the ring, to `entry`, which is still free. Returns the entry of
    /// the one after it. The first is at [`Self::next_entry`].
    #[inline]
    pub(in crate::engine) fn note(&mut self, entry: u16, descriptor: Descriptor) -> u16 {
        let [addr, rest] = descriptor;
        self.entries.array().write_words(entry.into(), REST, [rest.rotate_left(32), addr]);
        self.noted = entry;
        self.after = self.next[usize::from(entry)];
        self.after
    }

    /// [`Self::note`] for all descriptors of a chain. Returns its first entry.
    #[inline(always)]
    pub(in crate::engine) fn note_all<const N: usize>(&mut self, descriptors: &[Descriptor; N]) -> u16 {
        let head = self.free_head;
        if !self.note_neighbours(head, descriptors) {
            // A copy: the descriptors themselves stay in registers.
            self.note_scattered(*descriptors);
        }
        head
    }

    /// The same, if the next `N` free entries are neighbours: one check, and offsets that are constants. Chains return to the list
    /// as they were taken, so neighbours remain neighbours while all chains have one length.
    #[inline(always)]
    fn note_neighbours<const N: usize>(&mut self, head: u16, descriptors: &[Descriptor; N]) -> bool {
        const { assert!(N == 1 || N == LONGEST) };
        let head = usize::from(head);
        // 16 bits for each successor. None of those wanted needs more, if all of them are entries.
        let successors = (1..N).fold(0, |word, n| word | u64::from(self.next[head + n - 1]) << (16 * (n - 1)));
        let wanted = if N == 1 { 0 } else { head as u64 * 0x1_0001 + 0x2_0001 };
        if successors != wanted {
            return false;
        }
        let Some(run) = self.entries.select_run::<N>(head) else { return false };
        // By reference: the compiler unrolls it, and keeps the descriptors in registers.
        for (n, &[addr, rest]) in descriptors.iter().enumerate() {
            run.write_words(n, REST, [rest.rotate_left(32), addr]);
        }
        self.after = self.next[head + N - 1];
        self.ends[head] = self.after;
        self.write_links(if N == 1 { u64::from(self.after) | (head as u64) << 16 } else { wanted }, N as u64);
        true
    }

    #[cold]
    #[inline(never)]
    fn note_scattered<const N: usize>(&mut self, descriptors: [Descriptor; N]) {
        let mut entry = self.free_head;
        for descriptor in descriptors {
            entry = self.note(entry, descriptor);
        }
        self.finish(N as u64);
    }

    /// All of the chain of `entries` descriptors has been noted.
    #[inline]
    fn finish(&mut self, entries: u64) {
        let head = usize::from(self.free_head);
        self.entries.select(head);
        self.ends[head] = self.after;
        self.write_links(u64::from(self.next[head]) | u64::from(self.noted) << 16, entries);
    }

    /// Writes all of the current entry but its descriptor, and does not mark it yet: it is still free. The successor in `links` is
    /// the one that it has. The last entry follows.
    #[inline]
    fn write_links(&mut self, links: u64, entries: u64) {
        self.entries.current().write_part::<u64, LINKS>(links << 16 | entries << 48);
        self.entries.current().write_part::<u64, COUNTER>(self.counter);
    }

    /// The chain noted, of `entries` descriptors, has been taken.
    #[inline]
    pub(in crate::engine) fn take(&mut self, entries: u16) {
        self.finish(entries.into());
        self.take_noted();
    }

    /// The chain of [`Self::note_all`] has been taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take_noted(&mut self) {
        self.entries.current().write_part::<u8, INFLIGHT>(1);
        self.counter = self.counter.wrapping_add(1);
        // The chain counts as taken when its entries have left the list.
        self.free_head = self.after;
        self.set_free(self.free_head, self.free_head);
    }

    /// The chain that starts at `entry` is in the ring as used, and not yet published. Nothing is written: a chain may be taken
    /// before the publication, and the list must not have grown then.
    #[inline]
    pub(in crate::engine) fn push(&mut self, entry: u16) {
        self.batch[usize::from(self.pushed)] = entry;
        self.pushed += 1;
    }

    /// The flags that publish the batch will be written next. The ring's used position is `used` afterwards.
    #[inline]
    pub(in crate::engine) fn before_publish(&mut self, used: Position) {
        let before = self.free_head;
        self.free_head = self.link_batch();
        self.set_free(self.free_head, before);
        self.set_used(used, self.used);
        self.used = used;
    }

    /// Puts the batch before the free entries, in its order: chains that are returned in the order in which they were taken
    /// follow each other already. Returns the first entry.
    #[inline]
    fn link_batch(&mut self) -> u16 {
        let Some((&first, others)) = self.batch[..self.pushed.into()].split_first() else { return self.free_head };
        let mut before = first;
        // Four at a time: most of the instructions of a plain loop would count and compare.
        let (fours, rest) = others.as_chunks::<4>();
        let mut follow = |next: u16| {
            let end = &self.ends[usize::from(before)];
            if *end != next {
                link(&mut self.next, &self.entries, (before, *end), next);
            }
            before = next;
        };
        fours.iter().for_each(|four| four.iter().for_each(|&chain| follow(chain)));
        rest.iter().for_each(|&chain| follow(chain));
        follow(self.free_head);
        first
    }

    /// The batch has been published. There must be a full fence between that and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self) {
        let (fours, rest) = self.batch[..self.pushed.into()].as_chunks::<4>();
        fours.iter().for_each(|four| four.iter().for_each(|&entry| self.clear(entry)));
        rest.iter().for_each(|&entry| self.clear(entry));
        self.pushed = 0;
        self.set_free(self.free_head, self.free_head);
        self.set_used(self.used, self.used);
    }

    #[inline]
    fn clear(&self, entry: u16) {
        self.entries.array().write_part::<u8, INFLIGHT>(entry.into(), 0);
    }

    /// Writes both free heads by one store.
    #[inline]
    fn set_free(&self, head: u16, old: u16) {
        self.header.write_part::<u32, FREE_HEADS>(u32::from(head) | u32::from(old) << 16);
    }

    #[inline]
    fn set_used(&self, new: Position, old: Position) {
        self.header.write_part::<u64, USED>(used_word(new, old));
    }
}

/// Lets `next` follow the chain from `first` up to `end`, which follows it so far. A chain without that end is a bug in this
/// program: it panics, and does not walk for ever.
#[inline]
fn link(successors: &mut PerEntry<u16>, entries: &SharedCursor<u64, 4>, (first, end): (u16, u16), next: u16) {
    let mut chain =
        std::iter::successors(Some(first), |&entry| Some(successors[usize::from(entry)])).take(successors.len());
    let last = chain.find(|&entry| successors[usize::from(entry)] == end);
    let last = last.unwrap_or_else(|| panic!("the chain of entry {first} does not end before entry {end}"));
    set_next(successors, entries, last, next);
}

#[inline]
fn set_next(successors: &mut PerEntry<u16>, entries: &SharedCursor<u64, 4>, entry: u16, next: u16) {
    successors[usize::from(entry)] = next;
    entries.array().write_part::<u16, NEXT>(entry.into(), next);
}

/// With entry 0 as both free heads.
fn first_free_word(entries: u16) -> u64 {
    u64::from(VERSION) | u64::from(entries) << 16
}

#[inline]
fn used_word(new: Position, old: Position) -> u64 {
    let slots = u64::from(new.slot) | u64::from(old.slot) << 16;
    slots | u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40
}

fn per_entry<T: Clone + Default>(first: impl IntoIterator<Item = T>) -> PerEntry<T> {
    let mut all = vec![T::default(); (1 << u16::BITS) + LONGEST].into_boxed_slice();
    all.iter_mut().zip(first).for_each(|(value, first)| *value = first);
    all.try_into().unwrap_or_else(|_| unreachable!("as long as the type says"))
}

fn words(region: &InflightRegion, at: usize, count: u16) -> Words<&SharedMemory> {
    region.memory.array(at, count.into()).expect("`InflightRegion::new` has checked size and alignment")
}

/// Makes a record without marks, whose entries are all free. It counts once its version is written.
fn initialize(region: &InflightRegion, used: Position) {
    let count = region.entries;
    let (header, entries) = (words(region, 0, 1), words(region, HEADER, count));
    header.write_word(0, FREE, 0);
    header.write(0, [0, 0, used_word(used, used), 0]);
    for entry in 0..count {
        // The last one's successor does not exist, which ends the list.
        entries.write(entry.into(), [(u64::from(entry) + 1) << 16, 0, 0, 0]);
    }
    header.write_word(0, FREE, first_free_word(count));
}
