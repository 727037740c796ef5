//! What a new process does with the record of a split ring. A pure function of values that have been read once.

use super::contradiction::{Claim, Contradiction};
use super::{VERSION, in_order};

/// `DescStateSplit`, as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitEntry {
    /// 1 if the request that starts at this descriptor is in flight.
    pub inflight: u8,
    /// The entry before this one in the last batch.
    pub next: u16,
    /// Orders the requests.
    pub counter: u64,
}

/// `QueueRegionSplit`, as read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitRecord {
    /// 0.
    pub features: u64,
    /// 1, or 0 if it has never been used.
    pub version: u16,
    /// Number of entries.
    pub desc_num: u16,
    /// The entry of the last batch that was pushed last.
    pub last_batch_head: u16,
    /// used.idx when the marks of its batch had been cleared.
    pub used_idx: u16,
    /// One for each descriptor.
    pub entries: Vec<SplitEntry>,
}

/// The ring, as a new process finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitState {
    /// Number of descriptors.
    pub size: u16,
    /// used.idx in the used ring.
    pub used_idx: u16,
    /// avail.idx in the available ring.
    pub avail_idx: u16,
    /// The base of SET_VRING_BASE.
    pub base: u16,
}

/// What to do with a ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SplitRecovery {
    /// The record is new, or that of a former ring without requests. It can be initialized.
    Fresh,
    /// The same, but requests that nobody has recorded may be in flight.
    Unknown,
    /// The ring continues.
    Resume(SplitPlan),
}

/// How a ring continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SplitPlan {
    /// The heads whose marks must be cleared: they have been published.
    pub published: Vec<u16>,
    /// The heads of the requests to submit again, in their order.
    pub requests: Vec<u16>,
    /// The next avail index to take.
    pub next_avail: u16,
    /// The counter of the next request.
    pub next_counter: u64,
}

impl SplitPlan {
    /// For a ring without requests in flight.
    pub(super) fn empty(next_avail: u16) -> Self {
        Self { published: Vec::new(), requests: Vec::new(), next_avail, next_counter: 0 }
    }
}

/// Decides what has been published, and what must be submitted again. `entries` is the queue size of SET_INFLIGHT_FD.
///
/// # Errors
/// The record contradicts itself or the ring.
pub fn recover(record: &SplitRecord, entries: u16, state: &SplitState) -> Result<SplitRecovery, Contradiction> {
    let SplitState { size, used_idx, avail_idx, base } = *state;
    let SplitRecord { features, version, desc_num, .. } = *record;
    let fresh = if base == used_idx { SplitRecovery::Fresh } else { SplitRecovery::Unknown };
    match (version, features) {
        (0, _) => return Ok(fresh),
        (VERSION, 0) => {}
        _ => return Err(Claim::Format { version, features }.into()),
    }
    if desc_num != entries || record.entries.len() != usize::from(entries) {
        return Err(Claim::Entries { found: desc_num, entries }.into());
    }
    let last_batch = used_idx.wrapping_sub(record.used_idx);
    if last_batch > size {
        // A ring that has started anew with an old record. Without marks the record says nothing.
        let unmarked = record.entries.iter().all(|entry| entry.inflight == 0);
        let claim = Claim::UsedIndex { recorded: record.used_idx, used: used_idx, size };
        return if unmarked { Ok(fresh) } else { Err(claim.into()) };
    }
    let published = batch(record, last_batch)?;
    let (requests, next_counter) = marked(record, &published, size)?;
    // The driver has made at least these available, and at most `size`: `Vring` checks avail.idx before it takes more.
    let available = avail_idx.wrapping_sub(used_idx);
    let count = u16::try_from(requests.len()).unwrap_or(u16::MAX);
    if count > available {
        return Err(Claim::Count { marked: count, available }.into());
    }
    if base.wrapping_sub(used_idx) > available {
        return Err(Claim::Base { base, used: used_idx, avail: avail_idx }.into());
    }
    let next_avail = used_idx.wrapping_add(count);
    Ok(SplitRecovery::Resume(SplitPlan { published, requests, next_avail, next_counter }))
}

/// The last `count` entries that were pushed. They were published together, and their marks may remain.
fn batch(record: &SplitRecord, count: u16) -> Result<Vec<u16>, Contradiction> {
    let mut seen = vec![false; record.entries.len()];
    let mut heads = Vec::with_capacity(count.into());
    let mut head = record.last_batch_head;
    for _ in 0..count {
        match seen.get_mut(usize::from(head)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(Claim::Batch(head).into()),
        }
        heads.push(head);
        head = record.entries[usize::from(head)].next;
    }
    Ok(heads)
}

/// The heads that are marked and not `published`, in the order of their counters, and the next counter.
fn marked(record: &SplitRecord, published: &[u16], size: u16) -> Result<(Vec<u16>, u64), Contradiction> {
    let mut heads = Vec::new();
    for (entry, SplitEntry { inflight, counter, .. }) in (0..).zip(&record.entries) {
        match *inflight {
            0 => continue,
            1 if entry >= size => return Err(Claim::Head { entry, size }.into()),
            1 => heads.push((*counter, entry)),
            mark => return Err(Claim::Mark { entry, mark }.into()),
        }
    }
    heads.retain(|(_, entry)| !published.contains(entry));
    in_order(heads, |&entry| entry)
}
