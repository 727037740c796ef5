//! The packed virtqueue, device side (virtio 1.2 §2.8). Driver and device share one ring of descriptors. The driver makes
//! descriptors available, and the device overwrites them with used descriptors. The AVAIL and USED flags, compared with a wrap
//! counter, tell who owns a descriptor. Each side inverts its wrap counter when it passes the end of the ring.
//!
//! ```text
//!             next_used                      next_avail
//!  ... driver ... | ...... taken by device ..... | ... driver, possibly available ...
//!                 | next used descriptor         | next available descriptor
//! ```
//! `next_avail` is at most `size` descriptors ahead of the last used descriptor that has been published. Chains are returned in
//! any order. Each advances `next_used` by its number of descriptors.

mod logging;

use std::sync::atomic::{Ordering, fence};

use super::areas::map_areas;
use super::chain::{Chain, Head, WalkLimits};
use super::descriptor::{PackedDescriptor, PackedWords};
use super::fast_path::{FastDescriptor, FastRequest, FastRing};
use super::layout::{MAX_SIZE, RingFault};
use super::position::{Position, positions};
use crate::engine::dirty_log::RingLog;
use crate::engine::error::EngineError;
use crate::engine::guest_memory::{BatchView, GuestMemoryView};
use crate::engine::inflight_region::packed::PackedMarks;
use crate::engine::inflight_region::packed_recovery::{PackedRequest, PackedState};
use crate::engine::inflight_region::{Claim, Contradiction, InflightRegion, Recorded, Tracking};
use crate::engine::setup::VringSetup;
use crate::memory::MemTable;
use crate::sys::{SharedArray, SharedMemory};

/// VIRTQ_DESC_F_WRITE, in a used descriptor: the length is not 0 (virtio 1.2 §2.8.3).
const WRITE: u16 = 1 << 1;
/// VIRTQ_DESC_F_AVAIL, virtio 1.2 §2.8.1.
const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED, virtio 1.2 §2.8.1.
const USED: u16 = 1 << 15;

/// Size of a descriptor, and offsets of its fields (virtio 1.2 §2.8.13).
const DESCRIPTOR: usize = 16;
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;
/// The flags in the second word of a descriptor; the buffer ID is before them, the length in the lower half.
const FLAGS_SHIFT: u32 = 48;

// desc_event_flags, virtio 1.2 §2.8.14. Both fields of the structure are accessed as one word, `off_wrap` in the lower half.
const EVENT_FLAGS_DISABLE: u16 = 1;
const EVENT_FLAGS_DESC: u16 = 2;
const EVENT_FLAGS_MASK: u16 = 3;

/// Used descriptors that are completely written except for the first one's flags, which publish them all.
#[derive(Clone, Copy)]
struct Unpublished {
    slot: u16,
    flags: u16,
    /// Number of descriptors that the driver gets back.
    entries: u16,
}

/// One running packed virtqueue.
pub struct PackedRing {
    desc: SharedMemory,
    descriptors: SharedArray<SharedMemory, u64, 2>,
    driver_event: SharedMemory,
    device_event: SharedMemory,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: Position,
    next_used: Position,
    /// Number of descriptors taken and not yet published as used.
    taken: u16,
    /// Used descriptors since the last publication.
    unpublished: Option<Unpublished>,
    /// `next_used` at the last decision about a notification. `None` until the first.
    signalled_used: Option<Position>,
    marks: Option<PackedMarks>,
    log: Option<RingLog>,
    /// Requests to submit again, the first one last.
    recovered: Vec<PackedRequest>,
}

impl PackedRing {
    /// Finds the three areas in `table`.
    ///
    /// # Errors
    /// [`EngineError::RingArea`] or [`EngineError::RingBase`].
    pub fn new(setup: &VringSetup, table: &MemTable) -> Result<Self, EngineError> {
        let VringSetup { index, size, base, .. } = *setup;
        let [desc, driver_event, device_event] = map_areas(setup, table)?;
        let (next_avail, next_used) = positions(base, size).ok_or(EngineError::RingBase { index, size, base })?;
        let descriptors = desc.array(0, size.into()).expect("`map_areas` has checked size and alignment").into_owned();
        Ok(Self {
            desc,
            descriptors,
            driver_event,
            device_event,
            size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            next_avail,
            next_used,
            taken: next_used.distance(next_avail, size),
            unpublished: None,
            signalled_used: None,
            marks: None,
            log: None,
            recovered: Vec::new(),
        })
    }

    /// As [`super::Virtqueue::track`].
    ///
    /// # Errors
    /// The record is not believed. Nothing has changed.
    pub fn track(&mut self, region: &InflightRegion) -> Result<Tracking, Contradiction> {
        let Self { next_used, size, .. } = *self;
        let state = |old_used: u16| PackedState {
            size,
            old_used_flags: if old_used < size { self.flags(old_used) } else { 0 },
            base: (self.taken == 0).then_some(next_used),
        };
        let Some((marks, plan)) = PackedMarks::start(region, state)? else { return Ok(Tracking::Off) };
        // Nothing is written at or after the used position before it is published, so the driver's descriptor is still there. In a
        // ring that has started anew it is not (virtio 1.2 §2.8.1).
        let available = available(plan.used.wrap);
        if plan.taken != 0 && self.flags(plan.used.slot) & (AVAIL | USED) != available {
            return Err(Claim::NotAvailable { slot: plan.used.slot }.into());
        }
        self.next_used = plan.used;
        self.next_avail = self.next_used.advance(plan.taken, size);
        self.taken = plan.taken;
        self.marks = Some(marks);
        self.retract_unpublished();
        self.recovered = plan.requests.into_iter().rev().collect();
        Ok(Tracking::On { recovered: self.recovered.len() })
    }

    /// Makes the descriptors after `next_used` look available again, up to `next_avail`. The process before may have written
    /// used descriptors there and not published them. Once the one at `next_used` is published, the driver looks at the next.
    fn retract_unpublished(&self) {
        for n in 1..self.taken {
            let Position { slot, wrap } = self.next_used.advance(n, self.size);
            self.desc.write_u16(DESCRIPTOR * usize::from(slot) + FLAGS, available(wrap));
        }
    }

    fn flags(&self, slot: u16) -> u16 {
        self.desc.load_acquire_u16(DESCRIPTOR * usize::from(slot) + FLAGS)
    }

    /// True if there are requests to submit again.
    #[inline]
    #[must_use]
    pub fn has_recovered(&self) -> bool {
        !self.recovered.is_empty()
    }

    /// Reads the next of them, from its record: the driver's descriptors may have been overwritten by used ones. Returns false if
    /// there is none.
    pub fn take_recovered(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> bool {
        let Some(PackedRequest { entry, descriptors }) = self.recovered.pop() else { return false };
        let size = u16::try_from(descriptors.len()).expect("no more than the ring has");
        let limits = WalkLimits { size, indirect: self.indirect, longest_table: MAX_SIZE };
        let ends = chain.fill_packed(&limits, |n| PackedDescriptor::from_words(descriptors[usize::from(n)]), guest);
        debug_assert!(ends, "the recovery has checked where it ends");
        chain.set_record(Recorded::without_end(entry));
        true
    }

    /// Leaves them to the process that serves the ring next. Returns how many there are.
    pub fn forget_recovered(&mut self) -> u16 {
        u16::try_from(self.recovered.drain(..).len()).expect("at most as many as descriptors")
    }

    /// True if the requests in flight are recorded.
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        self.marks.is_some()
    }

    /// Number of descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Both positions, as GET_VRING_BASE returns them.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.raw()) | u32::from(self.next_used.raw()) << 16
    }

    /// Upper bound of the number of available chains; 0 if there is none.
    #[inline]
    #[must_use]
    pub fn available(&self) -> u16 {
        if self.offered().is_some() { self.size - self.taken } else { 0 }
    }

    /// The next descriptor, if it is available. The driver writes its flags last (virtio 1.2 §2.8.21), so they are read first,
    /// with acquire ordering: all that the driver wrote before is visible.
    #[inline]
    fn offered(&self) -> Option<PackedWords> {
        if self.taken == self.size {
            return None; // the next descriptor is one that we have taken
        }
        let Position { slot, wrap } = self.next_avail;
        let descriptor @ [_, rest] = self.descriptors.read_acquire(slot.into());
        let both = u64::from(AVAIL | USED) << FLAGS_SHIFT;
        (rest & both == u64::from(available(wrap)) << FLAGS_SHIFT).then_some(descriptor)
    }

    /// Takes the next chain. Returns false if there is none.
    ///
    /// # Errors
    /// [`RingFault::Endless`]. Nothing has been taken.
    #[inline]
    pub fn take(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> Result<bool, RingFault> {
        let Some(first) = self.offered() else { return Ok(false) };
        let (descriptors, size, start) = (&self.descriptors, self.size, self.next_avail);
        let limits = WalkLimits { size: size - self.taken, indirect: self.indirect, longest_table: MAX_SIZE };
        // Only the first descriptor's flags tell availability. It is not read again.
        let mut marks = self.marks.as_mut();
        let mut free = marks.as_ref().map_or(0, |marks| marks.next_entry());
        let entry = |n| {
            let words = if n == 0 { first } else { descriptors.read(start.advance(n, size).slot.into()) };
            if let Some(marks) = &mut marks {
                free = marks.note(free, words);
            }
            PackedDescriptor::from_words(words)
        };
        if !chain.fill_packed(&limits, entry, guest) {
            return Err(RingFault::Endless { slot: start.slot, room: limits.size });
        }
        let entries = chain.head().entries();
        if let Some(marks) = &mut self.marks {
            chain.set_record(marks.take(entries));
        }
        self.advance(entries);
        Ok(true)
    }

    #[inline]
    fn slot_after(&self, slot: u16) -> u16 {
        if slot + 1 == self.size { 0 } else { slot + 1 }
    }

    /// Records the next chain as taken, if there is a record. Returns `None` if only [`Self::take`] can.
    #[inline]
    fn record<const N: usize>(&mut self, descriptors: [PackedWords; N]) -> Option<Recorded> {
        let Some(marks) = &mut self.marks else { return Some(Recorded::default()) };
        marks.take_neighbours(&descriptors)
    }

    fn unrecord(&mut self, record: Recorded) {
        if let Some(marks) = &mut self.marks {
            marks.untake(record);
        }
    }

    #[inline]
    fn advance(&mut self, entries: u16) {
        self.next_avail = self.next_avail.advance(entries, self.size);
        self.taken += entries;
    }

    /// Returns a chain with `len` bytes written to it. The driver sees it after [`Self::publish`], which writes the first used
    /// descriptor's flags. The driver does not read past a descriptor that is not used.
    #[inline]
    pub fn push_used(&mut self, head: Head, len: u32) {
        let Position { slot, wrap } = self.next_used;
        let flags = if wrap { AVAIL | USED } else { 0 } | if len == 0 { 0 } else { WRITE };
        match &mut self.unpublished {
            Some(unpublished) => {
                let rest = u64::from(len) | u64::from(head.id()) << 32 | u64::from(flags) << FLAGS_SHIFT;
                self.descriptors.write_part::<u64, LEN>(slot.into(), rest);
                unpublished.entries += head.entries();
            }
            unpublished @ None => {
                self.descriptors.write_part::<u32, LEN>(slot.into(), len);
                self.descriptors.write_part::<u16, ID>(slot.into(), head.id());
                *unpublished = Some(Unpublished { slot, flags, entries: head.entries() });
            }
        }
        self.next_used = self.next_used.advance(head.entries(), self.size);
        if let Some(marks) = &mut self.marks {
            marks.push(head.record());
        }
    }

    /// True if there are unpublished used descriptors.
    #[inline]
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        self.unpublished.is_some()
    }

    /// Publishes all used descriptors. Returns true if the driver must be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if let Some(Unpublished { slot, flags, entries }) = self.unpublished.take() {
            if let Some(marks) = &mut self.marks {
                marks.before_publish(self.next_used);
            }
            self.desc.store_release_u16(DESCRIPTOR * usize::from(slot) + FLAGS, flags);
            self.taken -= entries;
        }
        // The driver writes its event suppression structure, then reads used descriptors; we write those, then read the
        // structure. Without a full fence on both sides, each could miss the other's write (virtio 1.2 §2.8.22).
        fence(Ordering::SeqCst);
        if let Some(marks) = &mut self.marks {
            marks.after_publish();
        }
        let [low, high, flags, _] = self.driver_event.read_u32(0).to_le_bytes();
        let before = self.signalled_used.replace(self.next_used);
        match u16::from(flags) & EVENT_FLAGS_MASK {
            EVENT_FLAGS_DISABLE => false,
            EVENT_FLAGS_DESC if self.event_idx => {
                // An invalid position would never be reached. Notify instead.
                let event = Position::from_raw(u16::from_le_bytes([low, high]), self.size);
                let (Some(before), Some(event)) = (before, event) else { return true };
                before.distance(event, self.size) < before.distance(self.next_used, self.size)
            }
            _ => true,
        }
    }

    /// Enables the driver's kicks. The caller must poll once more before it sleeps.
    pub fn arm(&self) {
        let event = u32::from(self.next_avail.raw()) | u32::from(EVENT_FLAGS_DESC) << 16;
        self.device_event.write_u32(0, if self.event_idx { event } else { 0 });
        self.mark_device_event();
        // Write the event suppression structure before the last poll, as the driver does before it reads used descriptors.
        fence(Ordering::SeqCst);
    }

    /// Suppresses the driver's kicks. With EVENT_IDX too, because the next round passes an old event position again.
    pub fn disarm(&self) {
        self.device_event.write_u32(0, u32::from(EVENT_FLAGS_DISABLE) << 16);
        self.mark_device_event();
    }
}

impl FastRing for PackedRing {
    #[inline(always)]
    fn push_used(&mut self, head: Head, len: u32) {
        Self::push_used(self, head, len);
    }

    #[inline(always)]
    fn peek_fast(&mut self, guest: &mut BatchView<'_>) -> Option<FastRequest> {
        let front = self.offered()?;
        let (first, id) = FastDescriptor::packed(front);
        if first.is_linked() && self.size - self.taken >= 3 {
            let second = self.slot_after(self.next_avail.slot);
            let back = [second, self.slot_after(second)].map(|slot| self.descriptors.read(slot.into()));
            let [(data, _), (status, id)] = back.map(FastDescriptor::packed);
            if !data.is_linked() || status.is_linked() {
                return None;
            }
            let request = FastRequest::new(Head::new(id, 3), [first, data, status])?;
            return Some(request.recorded(self.record([front, back[0], back[1]])?));
        }
        let table = first.table().filter(|_| self.indirect)?;
        // Before the table is read, for there is less to remember.
        let record = self.record([front])?;
        let request = guest.descriptors(table, 3).and_then(|table| {
            let request = [0, 1, 2].map(|n| FastDescriptor::packed(table.read(n)).0);
            FastRequest::new(Head::new(id, 1), request)
        });
        if request.is_none() {
            self.unrecord(record);
        }
        Some(request?.recorded(record))
    }

    /// [`Self::peek_fast`] has recorded it already.
    #[inline(always)]
    fn take_fast(&mut self, head: Head) {
        self.advance(head.entries());
    }

    #[cold]
    fn leave_fast(&mut self, head: Head) {
        self.unrecord(head.record());
    }
}

/// The AVAIL and USED flags of an available descriptor, virtio 1.2 §2.8.1.
#[inline]
fn available(wrap: bool) -> u16 {
    if wrap { AVAIL } else { USED }
}
