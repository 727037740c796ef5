//! The record of a packed ring: a copy of each descriptor taken. Entries that are not in use form a list.
//!
//! Each group of fields that belongs together is written by one store: both free heads, and both used positions. So a crash never
//! leaves a position with the wrap counter of another.

use std::mem::offset_of;

use zerocopy::{FromBytes, IntoBytes};

use super::packed_recovery::{PackedEntry, PackedPlan, PackedRecord, PackedRecovery, PackedState, recover};
use super::{Contradiction, InflightRegion, VERSION};
use crate::engine::virtqueue::position::Position;
use crate::sys::{SharedArray, SharedEntry, SharedMemory};

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

/// Both are four words.
type Words<O> = SharedArray<O, u64, 4>;

// Words of the header.
/// Version, number of entries and both free heads.
const FREE: usize = 1;
/// Both free heads, in bytes.
const FREE_HEADS: usize = offset_of!(Header, free_head);
/// Both used positions, in bytes.
const USED: usize = offset_of!(Header, used_idx);
const _: () = assert!(offset_of!(Header, version) == 8 && offset_of!(Header, desc_num) == 10);
const _: () = assert!(offset_of!(Header, free_head) == 12 && offset_of!(Header, old_free_head) == 14);
const _: () = assert!(offset_of!(Header, used_idx) == 16 && offset_of!(Header, old_used_idx) == 18);
const _: () = assert!(offset_of!(Header, used_wrap_counter) == 20 && offset_of!(Header, old_used_wrap_counter) == 21);

// Words of an entry.
/// `inflight`, `next`, `last` and `num`. The counter follows.
const MARK: usize = 0;
/// ID, flags and length: the second word of a ring's descriptor, with its halves exchanged. The address follows.
const REST: usize = 2;
const INFLIGHT: usize = offset_of!(Entry, inflight);
const NEXT: usize = offset_of!(Entry, next);
const _: () = assert!(INFLIGHT == 0 && NEXT == 2 && offset_of!(Entry, last) == 4 && offset_of!(Entry, num) == 6);
const _: () = assert!(offset_of!(Entry, counter) == 8 && offset_of!(Entry, id) == 16 && offset_of!(Entry, flags) == 18);
const _: () = assert!(offset_of!(Entry, len) == 20 && offset_of!(Entry, addr) == 24);

/// One number for each entry. As long as a number has values, so that an index needs no comparison. Pages beyond the last entry
/// are never touched.
type PerEntry = Box<[u16; 1 << u16::BITS]>;

/// A descriptor as in the ring: address; length, ID and flags.
pub(in crate::engine) type Descriptor = [u64; 2];

/// Offset of an entry.
#[inline]
fn at(entry: u16) -> usize {
    HEADER + ENTRY * usize::from(entry)
}

/// Marks the requests that a packed ring takes and publishes. It never reads the record: the list of free entries is kept here.
pub(in crate::engine) struct PackedMarks {
    header: SharedEntry<SharedMemory, u64, 4>,
    entries: Words<SharedMemory>,
    /// The text's global counter.
    counter: u64,
    free_head: u16,
    /// The entry of the descriptor noted last, and its successor.
    noted: u16,
    after: u16,
    /// The first word of the chain's first entry, once all of it has been noted.
    mark: u64,
    /// How many chains are pushed and not yet published, and which.
    pushed: u16,
    batch: PerEntry,
    /// For each entry its successor, in the list of free entries or in its chain: the `next` of the record.
    next: PerEntry,
    /// For the first entry of each chain, the last.
    last: PerEntry,
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
            header: header(region).into_owned().into_entry(0),
            entries: entries(region).into_owned(),
            counter: plan.next_counter,
            free_head: plan.free_head,
            noted: plan.free_head,
            after: plan.free_head,
            mark: 0,
            pushed: 0,
            batch: per_entry([]),
            next: per_entry(record.entries.iter().map(|entry| entry.next)),
            last: per_entry(record.entries.iter().map(|entry| entry.last)),
            used: plan.used,
        };
        marks.settle(&plan);
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
        self.after = self.copy(entry, descriptor);
        self.noted = entry;
        self.after
    }

    /// [`Self::note`] for all descriptors of a chain.
    #[inline]
    pub(in crate::engine) fn note_all<const N: usize>(&mut self, descriptors: &[Descriptor; N]) {
        let mut chain = [self.free_head; N];
        // By reference: the compiler unrolls it, and keeps the descriptors in registers.
        for (n, descriptor) in descriptors.iter().enumerate() {
            self.after = self.copy(chain[n], *descriptor);
            if let Some(next) = chain.get_mut(n + 1) {
                *next = self.after;
            }
        }
        self.finish(chain.get(1).map_or(self.after, |&second| second), chain[N - 1], N as u64);
    }

    #[inline]
    fn copy(&self, entry: u16, [addr, rest]: Descriptor) -> u16 {
        let next = self.next[usize::from(entry)];
        self.entries.write_words(entry.into(), REST, [rest.rotate_left(32), addr]);
        next
    }

    /// All of the chain has been noted.
    #[inline]
    fn finish(&mut self, second: u16, last: u16, entries: u64) {
        self.last[usize::from(self.free_head)] = last;
        self.mark = 1 | u64::from(second) << 16 | u64::from(last) << 32 | entries << 48;
    }

    /// The chain noted, of `entries` descriptors, has been taken.
    #[inline]
    pub(in crate::engine) fn take(&mut self, entries: u16) {
        self.finish(self.next[usize::from(self.free_head)], self.noted, entries.into());
        self.take_noted();
    }

    /// The chain of [`Self::note_all`] has been taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take_noted(&mut self) {
        self.entries.write_words(self.free_head.into(), MARK, [self.mark, self.counter]);
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
        let mut chains = self.batch[..self.pushed.into()].iter();
        let Some(&first) = chains.next() else { return self.free_head };
        let mut last = self.last[usize::from(first)];
        for &chain in chains {
            link(&mut self.next, &self.entries, last, chain);
            last = self.last[usize::from(chain)];
        }
        link(&mut self.next, &self.entries, last, self.free_head);
        first
    }

    /// The batch has been published. There must be a full fence between that and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self) {
        for &entry in &self.batch[..self.pushed.into()] {
            self.clear(entry);
        }
        self.pushed = 0;
        self.set_free(self.free_head, self.free_head);
        self.set_used(self.used, self.used);
    }

    #[inline]
    fn clear(&self, entry: u16) {
        self.entries.write_part::<u8, INFLIGHT>(entry.into(), 0);
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

/// Lets `next` follow `entry`. The record says so already if it does.
#[inline]
fn link(successors: &mut PerEntry, entries: &Words<SharedMemory>, entry: u16, next: u16) {
    let successor = &mut successors[usize::from(entry)];
    if *successor != next {
        *successor = next;
        entries.write_part::<u16, NEXT>(entry.into(), next);
    }
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

fn per_entry(first: impl IntoIterator<Item = u16>) -> PerEntry {
    let mut numbers = vec![0; 1 << u16::BITS];
    numbers.iter_mut().zip(first).for_each(|(number, first)| *number = first);
    numbers.try_into().expect("as long as the type says")
}

fn header(region: &InflightRegion) -> Words<&SharedMemory> {
    region.memory.array(0, 1).expect("`InflightRegion::new` has checked size and alignment")
}

fn entries(region: &InflightRegion) -> Words<&SharedMemory> {
    let entries = region.memory.array(HEADER, region.entries.into());
    entries.expect("`InflightRegion::new` has checked size and alignment")
}

/// Reads the whole record, each value once.
fn read(region: &InflightRegion) -> PackedRecord {
    let header: Header = region.memory.read(0);
    let entry = |index| {
        let Entry { inflight, next, last, num, counter, id, flags, len, addr, .. } = region.memory.read(at(index));
        PackedEntry { inflight, next, last, num, counter, id, flags, len, addr }
    };
    let entries = (0..region.entries).map(entry).collect();
    let Header { features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, .. } = header;
    let Header { used_wrap_counter, old_used_wrap_counter, .. } = header;
    PackedRecord {
        features,
        version,
        desc_num,
        free_head,
        old_free_head,
        used_idx,
        old_used_idx,
        used_wrap_counter,
        old_used_wrap_counter,
        entries,
    }
}

/// Makes a record without marks, whose entries are all free. It counts once its version is written.
fn initialize(region: &InflightRegion, used: Position) {
    let (header, entries, count) = (header(region), entries(region), region.entries);
    header.write_word(0, FREE, 0);
    header.write(0, [0, 0, used_word(used, used), 0]);
    for entry in 0..count {
        // The last one's successor does not exist, which ends the list.
        entries.write(entry.into(), [(u64::from(entry) + 1) << 16, 0, 0, 0]);
    }
    header.write_word(0, FREE, first_free_word(count));
}
