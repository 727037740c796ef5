//! The record of a packed ring: a copy of each descriptor taken. Entries that are not in use form a list.
//!
//! Each group of fields that belongs together is written by one store: both free heads, and both used positions. So a crash never
//! leaves a position with the wrap counter of another.

use std::mem::offset_of;

use zerocopy::{FromBytes, IntoBytes};

use super::packed_recovery::{PackedEntry, PackedPlan, PackedRecord, PackedRecovery, PackedState, recover};
use super::{Contradiction, InflightRegion, VERSION};
use crate::engine::virtqueue::layout::MAX_SIZE;
use crate::engine::virtqueue::position::Position;
use crate::sys::{SharedArray, SharedMemory};

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
/// Both used positions.
const USED: usize = 2;
const _: () = assert!(offset_of!(Header, version) == 8 && offset_of!(Header, desc_num) == 10);
const _: () = assert!(offset_of!(Header, free_head) == 12 && offset_of!(Header, old_free_head) == 14);
const _: () = assert!(offset_of!(Header, used_idx) == 16 && offset_of!(Header, old_used_idx) == 18);
const _: () = assert!(offset_of!(Header, used_wrap_counter) == 20 && offset_of!(Header, old_used_wrap_counter) == 21);

// Words of an entry.
/// `inflight`, `next`, `last` and `num`.
const MARK: usize = 0;
const COUNTER: usize = 1;
/// ID, flags and length: the second word of a ring's descriptor, with its halves exchanged. The address follows.
const REST: usize = 2;
const INFLIGHT: usize = offset_of!(Entry, inflight);
const NEXT: usize = offset_of!(Entry, next);
const _: () = assert!(INFLIGHT == 0 && NEXT == 2 && offset_of!(Entry, last) == 4 && offset_of!(Entry, num) == 6);
const _: () = assert!(offset_of!(Entry, counter) == 8 && offset_of!(Entry, id) == 16 && offset_of!(Entry, flags) == 18);
const _: () = assert!(offset_of!(Entry, len) == 20 && offset_of!(Entry, addr) == 24);

/// One number for each entry. The length is a constant, and a power of two, so that an index needs no comparison.
type PerEntry = Box<[u16; MAX_SIZE as usize]>;
const _: () = assert!(MAX_SIZE.is_power_of_two());

/// A descriptor as in the ring: address; length, ID and flags.
pub(in crate::engine) type Descriptor = [u64; 2];

/// Index of an entry in [`PerEntry`].
#[inline]
fn slot(entry: u16) -> usize {
    usize::from(entry & (MAX_SIZE - 1))
}

/// Offset of an entry.
#[inline]
fn at(entry: u16) -> usize {
    HEADER + ENTRY * usize::from(entry)
}

/// Marks the requests that a packed ring takes and publishes. It never reads the record: the list of free entries is kept here.
pub(in crate::engine) struct PackedMarks {
    memory: SharedMemory,
    header: Words<SharedMemory>,
    entries: Words<SharedMemory>,
    /// The text's global counter.
    counter: u64,
    free_head: u16,
    /// The position before the next publication.
    used: Position,
    /// For each entry its successor, in the list of free entries or in its chain.
    next: PerEntry,
    /// For the first entry of each chain, the last.
    last: PerEntry,
    /// The chains pushed and not yet published, and how many.
    batch: PerEntry,
    pushed: u16,
    /// Number of entries.
    count: u16,
    /// The entry of the descriptor noted last.
    noted: u16,
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
            memory: region.memory.clone(),
            header: header(region).into_owned(),
            entries: entries(region).into_owned(),
            counter: plan.next_counter,
            free_head: plan.free_head,
            used: plan.used,
            next: per_entry(&record, |entry| entry.next),
            last: per_entry(&record, |entry| entry.last),
            batch: Box::new([0; MAX_SIZE as usize]),
            pushed: 0,
            count: region.entries,
            noted: plan.free_head,
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
    pub(in crate::engine) fn note(&mut self, entry: u16, [addr, rest]: Descriptor) -> u16 {
        self.entries.write_words(entry.into(), REST, [rest.rotate_left(32), addr]);
        self.noted = entry;
        self.next[slot(entry)]
    }

    /// The chain noted, of `entries` descriptors, has been taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take(&mut self, entries: u16) {
        let (head, last) = (self.free_head, self.noted);
        self.last[slot(head)] = last;
        let mark = 1 | u64::from(self.next[slot(head)]) << 16 | u64::from(last) << 32 | u64::from(entries) << 48;
        self.entries.write_word(head.into(), COUNTER, self.counter);
        self.entries.write_word(head.into(), MARK, mark);
        self.counter = self.counter.wrapping_add(1);
        // The chain counts as taken when its entries have left the list.
        self.free_head = self.next[slot(last)];
        self.set_free(self.free_head, self.free_head);
    }

    /// The chain that starts at `entry` is in the ring as used, and not yet published. Nothing is written: a chain may be taken
    /// before the publication, and the list must not have grown then.
    #[inline]
    pub(in crate::engine) fn push(&mut self, entry: u16) {
        self.batch[slot(self.pushed)] = entry;
        self.pushed += 1;
    }

    /// The flags that publish the batch will be written next. The ring's used position is `used` afterwards.
    #[inline]
    pub(in crate::engine) fn before_publish(&mut self, used: Position) {
        let mut free = self.free_head;
        for n in 0..self.pushed {
            let entry = self.batch[slot(n)];
            let last = self.last[slot(entry)];
            self.next[slot(last)] = free;
            self.memory.write_u16(at(last) + NEXT, free);
            free = entry;
        }
        let before = std::mem::replace(&mut self.free_head, free);
        self.set_free(free, before);
        self.set_used(used, self.used);
        self.used = used;
    }

    /// The batch has been published. There must be a full fence between that and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self) {
        for n in 0..self.pushed {
            self.clear(self.batch[slot(n)]);
        }
        self.pushed = 0;
        self.set_free(self.free_head, self.free_head);
        self.set_used(self.used, self.used);
    }

    #[inline]
    fn clear(&self, entry: u16) {
        self.memory.write_u8(at(entry) + INFLIGHT, 0);
    }

    #[inline]
    fn set_free(&self, head: u16, old: u16) {
        self.header.write_word(0, FREE, free_word(VERSION, self.count, head, old));
    }

    #[inline]
    fn set_used(&self, new: Position, old: Position) {
        self.header.write_word(0, USED, used_word(new, old));
    }
}

#[inline]
fn free_word(version: u16, entries: u16, head: u16, old: u16) -> u64 {
    u64::from(version) | u64::from(entries) << 16 | u64::from(head) << 32 | u64::from(old) << 48
}

#[inline]
fn used_word(new: Position, old: Position) -> u64 {
    let slots = u64::from(new.slot) | u64::from(old.slot) << 16;
    slots | u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40
}

fn per_entry(record: &PackedRecord, number: impl Fn(&PackedEntry) -> u16) -> PerEntry {
    let mut numbers = Box::new([0; MAX_SIZE as usize]);
    numbers.iter_mut().zip(&record.entries).for_each(|(slot, entry)| *slot = number(entry));
    numbers
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
    header.write_word(0, FREE, free_word(VERSION, count, 0, 0));
}
