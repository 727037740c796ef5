//! What a new process does with the record of a packed ring. A pure function of values that have been read once.

use super::contradiction::{Claim, Contradiction};
use super::{VERSION, in_order};
use crate::engine::virtqueue::descriptor::{INDIRECT, NEXT, PackedWords};
use crate::engine::virtqueue::position::Position;

/// VIRTQ_DESC_F_USED, virtio 1.2 §2.8.1.
const USED: u16 = 1 << 15;

/// `DescStatePacked`, as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedEntry {
    /// 1 if the chain that starts here is in flight.
    pub inflight: u8,
    /// The next entry of the chain, or of the list of free entries.
    pub next: u16,
    /// The last entry of the chain.
    pub last: u16,
    /// Number of descriptors of the chain.
    pub num: u16,
    /// Orders the requests.
    pub counter: u64,
    /// The descriptor's buffer ID.
    pub id: u16,
    /// The descriptor's flags.
    pub flags: u16,
    /// The descriptor's length.
    pub len: u32,
    /// The descriptor's address.
    pub addr: u64,
}

/// `QueueRegionPacked`, as read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedRecord {
    /// 0.
    pub features: u64,
    /// 1, or 0 if it has never been used.
    pub version: u16,
    /// Number of entries.
    pub desc_num: u16,
    /// The first free entry after the last publication.
    pub free_head: u16,
    /// The first free entry before it.
    pub old_free_head: u16,
    /// The used position after the last publication.
    pub used_idx: u16,
    /// The used position before it.
    pub old_used_idx: u16,
    /// The wrap counter of `used_idx`.
    pub used_wrap_counter: u8,
    /// The wrap counter of `old_used_idx`.
    pub old_used_wrap_counter: u8,
    /// As many as the ring may have descriptors.
    pub entries: Vec<PackedEntry>,
}

/// The ring, as a new process finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedState {
    /// Number of descriptors.
    pub size: u16,
    /// The flags of the descriptor at `old_used_idx`, or anything if there is none.
    pub old_used_flags: u16,
    /// The used position of SET_VRING_BASE, if the available one is the same.
    pub base: Option<Position>,
}

/// What to do with a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackedRecovery {
    /// The record is new, or that of a former ring without requests. It can be initialized for a ring at this position.
    Fresh(Position),
    /// The same, but requests that nobody has recorded may be in flight.
    Unknown,
    /// The ring continues.
    Resume(PackedPlan),
}

/// A request to submit again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedRequest {
    /// Its first entry.
    pub entry: u16,
    /// Its descriptors, as they were in the ring.
    pub descriptors: Vec<PackedWords>,
}

/// How a ring continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedPlan {
    /// True if the last publication has been seen by the driver, and the record has not been brought up to it. Else it is rolled
    /// back, or there is nothing to do.
    pub completed: bool,
    /// The first free entry.
    pub free_head: u16,
    /// The next used position.
    pub used: Position,
    /// The free entries whose marks must be cleared.
    pub stale: Vec<u16>,
    /// The requests to submit again, in their order.
    pub requests: Vec<PackedRequest>,
    /// Number of descriptors of these. The available position is so far ahead of the used one.
    pub taken: u16,
    /// The counter of the next request.
    pub next_counter: u64,
}

impl PackedPlan {
    /// For a ring without requests in flight, and a record whose entries are all free.
    pub(super) fn empty(used: Position) -> Self {
        let (stale, requests) = (Vec::new(), Vec::new());
        Self { completed: false, free_head: 0, used, stale, requests, taken: 0, next_counter: 0 }
    }
}

/// Decides whether the last publication has happened, and what must be submitted again. `entries` is the queue size of
/// SET_INFLIGHT_FD.
///
/// A base says nothing about a ring that has run: QEMU has no way to learn the position of a packed ring after a disconnect, and
/// sends the one of the last start.
///
/// # Errors
/// The record contradicts itself or the ring.
pub fn recover(record: &PackedRecord, entries: u16, state: &PackedState) -> Result<PackedRecovery, Contradiction> {
    let PackedRecord { features, version, desc_num, .. } = *record;
    let fresh = state.base.map_or(PackedRecovery::Unknown, PackedRecovery::Fresh);
    match (version, features) {
        (0, _) => return Ok(fresh),
        (VERSION, 0) => {}
        _ => return Err(Claim::Format { version, features }.into()),
    }
    if desc_num != entries || record.entries.len() != usize::from(entries) {
        return Err(Claim::Entries { found: desc_num, entries }.into());
    }
    let new = position(record.used_idx, record.used_wrap_counter, state.size);
    let old = position(record.old_used_idx, record.old_used_wrap_counter, state.size);
    let (new, old) = match (new, old) {
        (Ok(new), Ok(old)) => (new, old),
        // A shorter ring that has started anew with an old record. Without marks the record says nothing.
        _ if record.entries.iter().all(|entry| entry.inflight == 0) => return Ok(fresh),
        (Err(claim), _) | (_, Err(claim)) => return Err(claim.into()),
    };
    // The flags at the old position publish the whole batch. In the round of `old` the driver sets USED to the inverse of the
    // wrap counter, and the device to the counter itself (virtio 1.2 §2.8.1); so does the driver in the next round.
    let completed = new != old && (state.old_used_flags & USED != 0) == old.wrap;
    let (free_head, used) = if completed { (record.free_head, new) } else { (record.old_free_head, old) };
    let free = free_entries(record, free_head)?;
    if completed && record.free_head != record.old_free_head {
        check_batch(record, &free, old.distance(new, state.size))?;
    }
    let mut owned = free.mask;
    let requests = in_flight(record, &mut owned)?;
    if let Some(entry) = (0..entries).find(|&entry| !owned[usize::from(entry)]) {
        return Err(Claim::Leaked(entry).into());
    }
    let taken = requests.iter().map(|(_, request)| request.descriptors.len()).sum::<usize>();
    let taken = u16::try_from(taken).ok().filter(|&taken| taken <= state.size);
    let taken = taken.ok_or(Claim::Descriptors { size: state.size })?;
    let (requests, next_counter) = in_order(requests, |request| request.entry)?;
    let stale = free.list.into_iter().filter(|&entry| record.entries[usize::from(entry)].inflight != 0).collect();
    Ok(PackedRecovery::Resume(PackedPlan { completed, free_head, used, stale, requests, taken, next_counter }))
}

fn position(slot: u16, wrap: u8, size: u16) -> Result<Position, Claim> {
    if slot < size && wrap <= 1 {
        Ok(Position { slot, wrap: wrap == 1 })
    } else {
        Err(Claim::Position { slot, wrap, size })
    }
}

/// The free entries.
struct Free {
    list: Vec<u16>,
    /// True for each entry in the list.
    mask: Vec<bool>,
}

/// Follows the list of free entries from `head`. An index past the last entry ends it.
fn free_entries(record: &PackedRecord, head: u16) -> Result<Free, Contradiction> {
    let mut free = Free { list: Vec::new(), mask: vec![false; record.entries.len()] };
    let mut entry = head;
    while let Some(is_free) = free.mask.get_mut(usize::from(entry)) {
        if std::mem::replace(is_free, true) {
            return Err(Claim::Free(entry).into());
        }
        free.list.push(entry);
        entry = record.entries[usize::from(entry)].next;
    }
    Ok(free)
}

/// Checks that the last publication has freed as many entries as the used position has advanced.
fn check_batch(record: &PackedRecord, free: &Free, advanced: u16) -> Result<(), Contradiction> {
    let old = record.old_free_head;
    let freed = free.list.iter().position(|&entry| entry == old);
    // The list was empty before if the old head does not exist.
    let freed = freed.or((usize::from(old) >= record.entries.len()).then_some(free.list.len()));
    match freed {
        Some(freed) if freed == usize::from(advanced) => Ok(()),
        _ => Err(Claim::Freed { advanced, free_head: record.free_head, old }.into()),
    }
}

/// The chains that are marked and not free, with their counters. Their entries are added to `owned`.
fn in_flight(record: &PackedRecord, owned: &mut [bool]) -> Result<Vec<(u64, PackedRequest)>, Contradiction> {
    let mut requests = Vec::new();
    let free = owned.to_vec();
    for (head, entry) in (0..).zip(&record.entries) {
        match entry.inflight {
            0 => {}
            1 if free[usize::from(head)] => {}
            1 => requests.push((entry.counter, chain(record, head, owned)?)),
            mark => return Err(Claim::Mark { entry: head, mark }.into()),
        }
    }
    Ok(requests)
}

/// The chain that starts at `head`. Its entries are added to `owned`.
fn chain(record: &PackedRecord, head: u16, owned: &mut [bool]) -> Result<PackedRequest, Contradiction> {
    let PackedEntry { num, last, .. } = record.entries[usize::from(head)];
    let mut descriptors = Vec::new();
    let mut index = head;
    for n in 1..=num {
        let (Some(entry), Some(is_owned)) = (record.entries.get(usize::from(index)), owned.get_mut(usize::from(index)))
        else {
            return Err(Claim::Chain { head, entry: index }.into());
        };
        let more = entry.flags & NEXT != 0 && !(n == 1 && entry.flags & (NEXT | INDIRECT) == INDIRECT);
        if std::mem::replace(is_owned, true) || more != (n < num) || n == num && index != last {
            return Err(Claim::Chain { head, entry: index }.into());
        }
        let rest = u64::from(entry.len) | u64::from(entry.id) << 32 | u64::from(entry.flags) << 48;
        descriptors.push([entry.addr, rest]);
        index = entry.next;
    }
    if descriptors.is_empty() {
        return Err(Claim::Chain { head, entry: head }.into());
    }
    Ok(PackedRequest { entry: head, descriptors })
}
