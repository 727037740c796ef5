//! The record of a packed ring: a copy of each descriptor taken. Entries that are not in use form a list.
//!
//! Each group of fields that belongs together is written by one store: both free heads, and both used positions. So a crash never
//! leaves a position with the wrap counter of another.

use zerocopy::{FromBytes, IntoBytes};

use super::packed_recovery::{PackedEntry, PackedPlan, PackedRecord, PackedRecovery, PackedState, recover};
use super::{Contradiction, InflightRegion, VERSION};
use crate::engine::virtqueue::position::Position;
use crate::sys::SharedMemory;

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

/// The word with version, number of entries and both free heads.
const FREE: usize = std::mem::offset_of!(Header, version);
/// The word with both used positions.
const USED: usize = std::mem::offset_of!(Header, used_idx);
const _: () = assert!(FREE == 8 && USED == 16);
const _: () = assert!(std::mem::offset_of!(Header, free_head) == FREE + 4);
const _: () = assert!(std::mem::offset_of!(Header, old_free_head) == FREE + 6);
const _: () = assert!(std::mem::offset_of!(Header, old_used_idx) == USED + 2);
const _: () = assert!(std::mem::offset_of!(Header, used_wrap_counter) == USED + 4);
const _: () = assert!(std::mem::offset_of!(Header, old_used_wrap_counter) == USED + 5);

const INFLIGHT: usize = std::mem::offset_of!(Entry, inflight);
const NEXT: usize = std::mem::offset_of!(Entry, next);
const COUNTER: usize = std::mem::offset_of!(Entry, counter);
/// The word with ID, flags and length: the second word of a ring's descriptor, with its halves exchanged.
const REST: usize = std::mem::offset_of!(Entry, id);
const ADDR: usize = std::mem::offset_of!(Entry, addr);
const _: () = assert!(INFLIGHT == 0 && NEXT == 2 && COUNTER == 8 && REST == 16 && ADDR == 24);
const _: () = assert!(std::mem::offset_of!(Entry, last) == 4 && std::mem::offset_of!(Entry, num) == 6);
const _: () = assert!(std::mem::offset_of!(Entry, flags) == 18 && std::mem::offset_of!(Entry, len) == 20);

/// A descriptor as in the ring: address; length, ID and flags.
pub(in crate::engine) type Descriptor = [u64; 2];

/// Offset of an entry.
#[inline]
fn at(entry: u16) -> usize {
    HEADER + ENTRY * usize::from(entry)
}

/// Marks the requests that a packed ring takes and publishes. It never reads the record: the list of free entries is kept here.
pub(in crate::engine) struct PackedMarks {
    memory: SharedMemory,
    /// The text's global counter.
    counter: u64,
    free_head: u16,
    /// The position before the next publication.
    used: Position,
    /// For each entry its successor, in the list of free entries or in its chain.
    next: Vec<u16>,
    /// For the first entry of each chain, the last.
    last: Vec<u16>,
    /// The chains pushed and not yet published. Its capacity is the ring's size.
    batch: Vec<u16>,
    /// The descriptors of the chain that is being read.
    chain: Vec<Descriptor>,
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
            counter: plan.next_counter,
            free_head: plan.free_head,
            used: plan.used,
            next: record.entries.iter().map(|entry| entry.next).collect(),
            last: record.entries.iter().map(|entry| entry.last).collect(),
            batch: Vec::with_capacity(state.size.into()),
            chain: Vec::with_capacity(state.size.into()),
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

    /// The `n`th descriptor of the next chain, as it was read from the ring.
    #[inline]
    pub(in crate::engine) fn note(&mut self, n: u16, descriptor: Descriptor) {
        if n == 0 {
            self.chain.clear();
        }
        self.chain.push(descriptor);
    }

    /// The chain noted, of `entries` descriptors, has been taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take(&mut self, entries: u16) {
        let head = self.free_head;
        let (mut entry, mut last) = (head, head);
        for &[addr, rest] in self.chain.iter().take(entries.into()) {
            self.memory.write_u64(at(entry) + REST, rest.rotate_left(32));
            self.memory.write_u64(at(entry) + ADDR, addr);
            last = entry;
            entry = self.next[usize::from(entry)];
        }
        self.last[usize::from(head)] = last;
        self.memory.write_u64(at(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        let next = u64::from(self.next[usize::from(head)]);
        // `inflight`, `next`, `last` and `num`.
        let mark = 1 | next << 16 | u64::from(last) << 32 | u64::from(entries) << 48;
        self.memory.write_u64(at(head), mark);
        // The chain counts as taken when its entries have left the list.
        self.free_head = entry;
        self.set_free(entry, entry);
    }

    /// The chain that starts at `entry` is in the ring as used, and not yet published. Nothing is written: a chain may be taken
    /// before the publication, and the list must not have grown then.
    #[inline]
    pub(in crate::engine) fn push(&mut self, entry: u16) {
        self.batch.push(entry);
    }

    /// The flags that publish the batch will be written next. The ring's used position is `used` afterwards.
    #[inline]
    pub(in crate::engine) fn before_publish(&mut self, used: Position) {
        let before = self.free_head;
        for &entry in &self.batch {
            let last = self.last[usize::from(entry)];
            self.next[usize::from(last)] = self.free_head;
            self.memory.write_u16(at(last) + NEXT, self.free_head);
            self.free_head = entry;
        }
        self.set_free(self.free_head, before);
        self.set_used(used, self.used);
        self.used = used;
    }

    /// The batch has been published. There must be a full fence between that and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self) {
        for &entry in &self.batch {
            self.clear(entry);
        }
        self.batch.clear();
        self.set_free(self.free_head, self.free_head);
        self.set_used(self.used, self.used);
    }

    #[inline]
    fn clear(&self, entry: u16) {
        self.memory.write_u8(at(entry) + INFLIGHT, 0);
    }

    #[inline]
    fn set_free(&self, head: u16, old: u16) {
        set_free(&self.memory, (VERSION, self.next.len()), (head, old));
    }

    #[inline]
    fn set_used(&self, new: Position, old: Position) {
        let slots = u64::from(new.slot) | u64::from(old.slot) << 16;
        self.memory.write_u64(USED, slots | u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40);
    }
}

#[inline]
fn set_free(memory: &SharedMemory, (version, entries): (u16, usize), (head, old): (u16, u16)) {
    let fixed = u64::from(version) | (entries as u64) << 16;
    memory.write_u64(FREE, fixed | u64::from(head) << 32 | u64::from(old) << 48);
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
    let InflightRegion { memory, entries } = region;
    set_free(memory, (0, 0), (0, 0));
    memory.write_u64(0, 0);
    memory.write_u64(USED, u64::from(used.slot) * 0x1_0001 | u64::from(used.wrap) * 0x101 << 32);
    memory.write_u64(USED + 8, 0);
    for entry in 0..*entries {
        // The last one's successor does not exist, which ends the list.
        memory.write_u64(at(entry), u64::from(entry + 1) << 16);
        [COUNTER, REST, ADDR].iter().for_each(|field| memory.write_u64(at(entry) + field, 0));
    }
    set_free(memory, (VERSION, usize::from(*entries)), (0, 0));
}
