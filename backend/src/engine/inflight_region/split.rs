//! The record of a split ring: one entry for each descriptor. Only the entries of heads are used.

use zerocopy::{FromBytes, IntoBytes};

use super::split_recovery::{SplitEntry, SplitPlan, SplitRecord, SplitRecovery, SplitState, recover};
use super::{Contradiction, InflightRegion, VERSION};
use crate::sys::SharedMemory;

/// vhost-user: `QueueRegionSplit`, without its array.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    features: u64,
    version: u16,
    desc_num: u16,
    last_batch_head: u16,
    used_idx: u16,
}

/// vhost-user: `DescStateSplit`.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Entry {
    inflight: u8,
    padding: [u8; 5],
    next: u16,
    counter: u64,
}

/// Bytes before the array.
pub(super) const HEADER: usize = size_of::<Header>();
/// Bytes of one entry.
pub(super) const ENTRY: usize = size_of::<Entry>();
const _: () = assert!(HEADER == 16 && ENTRY == 16);

const VERSION_AT: usize = std::mem::offset_of!(Header, version);
const DESC_NUM: usize = std::mem::offset_of!(Header, desc_num);
const LAST_BATCH_HEAD: usize = std::mem::offset_of!(Header, last_batch_head);
const USED_IDX: usize = std::mem::offset_of!(Header, used_idx);
const INFLIGHT: usize = std::mem::offset_of!(Entry, inflight);
const NEXT: usize = std::mem::offset_of!(Entry, next);
const COUNTER: usize = std::mem::offset_of!(Entry, counter);
const _: () = assert!(VERSION_AT == 8 && DESC_NUM == 10 && LAST_BATCH_HEAD == 12 && USED_IDX == 14);
const _: () = assert!(INFLIGHT == 0 && NEXT == 6 && COUNTER == 8);

/// Offset of the entry of `head`.
#[inline]
fn at(head: u16) -> usize {
    HEADER + ENTRY * usize::from(head)
}

/// Marks the requests that a split ring takes and publishes. It never reads the record.
pub(in crate::engine) struct SplitMarks {
    memory: SharedMemory,
    /// The text's global counter.
    counter: u64,
    last_batch_head: u16,
    /// The heads pushed and not yet published. Its capacity is the ring's size.
    batch: Vec<u16>,
}

impl SplitMarks {
    /// Recovers the record of a ring in `state`, or initializes it. `None` if it must not be used.
    pub(in crate::engine) fn start(
        region: &InflightRegion,
        state: &SplitState,
    ) -> Result<Option<(Self, SplitPlan)>, Contradiction> {
        let record = read(region);
        let plan = match recover(&record, region.entries, state)? {
            SplitRecovery::Unknown => return Ok(None),
            SplitRecovery::Fresh => {
                initialize(region, state.used_idx);
                SplitPlan::empty(state.used_idx)
            }
            SplitRecovery::Resume(plan) => plan,
        };
        let batch = Vec::with_capacity(state.size.into());
        let (counter, last_batch_head) = (plan.next_counter, record.last_batch_head);
        let mut marks = Self { memory: region.memory.clone(), counter, last_batch_head, batch };
        // If the process is killed before `used_idx` is written, the next recovery clears the same entries again.
        plan.published.iter().for_each(|&head| marks.clear(head));
        marks.set_used_idx(state.used_idx);
        marks.last_batch_head = 0;
        Ok(Some((marks, plan)))
    }

    /// A request has been taken. It is marked before anything is done for it.
    #[inline]
    pub(in crate::engine) fn take(&mut self, head: u16) {
        self.memory.write_u64(at(head) + COUNTER, self.counter);
        self.memory.write_u8(at(head) + INFLIGHT, 1);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A request is in the used ring, and not yet published.
    #[inline]
    pub(in crate::engine) fn push(&mut self, head: u16) {
        self.memory.write_u16(at(head) + NEXT, self.last_batch_head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// used.idx will be written next.
    #[inline]
    pub(in crate::engine) fn before_publish(&self) {
        self.memory.write_u16(LAST_BATCH_HEAD, self.last_batch_head);
    }

    /// used.idx has been written. There must be a full fence between it and this.
    #[inline]
    pub(in crate::engine) fn after_publish(&mut self, used_idx: u16) {
        for &head in &self.batch {
            self.clear(head);
        }
        self.batch.clear();
        self.set_used_idx(used_idx);
    }

    #[inline]
    fn clear(&self, head: u16) {
        self.memory.write_u8(at(head) + INFLIGHT, 0);
    }

    #[inline]
    fn set_used_idx(&self, used_idx: u16) {
        self.memory.write_u16(USED_IDX, used_idx);
    }
}

/// Reads the whole record, each value once.
fn read(region: &InflightRegion) -> SplitRecord {
    let Header { features, version, desc_num, last_batch_head, used_idx } = region.memory.read(0);
    let entry = |head| {
        let Entry { inflight, next, counter, .. } = region.memory.read(at(head));
        SplitEntry { inflight, next, counter }
    };
    SplitRecord {
        features,
        version,
        desc_num,
        last_batch_head,
        used_idx,
        entries: (0..region.entries).map(entry).collect(),
    }
}

/// Makes a record without marks. It counts once its version is written.
fn initialize(region: &InflightRegion, used_idx: u16) {
    let memory = &region.memory;
    memory.write_u16(VERSION_AT, 0);
    memory.write_u64(0, 0);
    memory.write_u16(DESC_NUM, region.entries);
    memory.write_u16(LAST_BATCH_HEAD, 0);
    memory.write_u16(USED_IDX, used_idx);
    for head in 0..region.entries {
        memory.write_u64(at(head), 0);
        memory.write_u64(at(head) + COUNTER, 0);
    }
    memory.write_u16(VERSION_AT, VERSION);
}
