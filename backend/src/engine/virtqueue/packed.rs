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

use std::sync::atomic::{Ordering, fence};

use super::areas::map_areas;
use super::chain::{Chain, Head, WalkLimits};
use super::descriptor::PackedDescriptor;
use super::fast_path::{FastDescriptor, FastRequest};
use super::layout::{MAX_SIZE, RingFault};
use crate::engine::error::EngineError;
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::inflight_region::{Contradiction, InflightRegion, Tracking};
use crate::engine::setup::VringSetup;
use crate::memory::MemTable;
use crate::sys::{SharedArray, SharedMemory};

/// VIRTQ_DESC_F_WRITE, in a used descriptor: the length is not 0 (virtio 1.2 §2.8.3).
const WRITE: u16 = 1 << 1;
/// VIRTQ_DESC_F_AVAIL, virtio 1.2 §2.8.1.
const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED, virtio 1.2 §2.8.1.
const USED: u16 = 1 << 15;
/// The wrap counter in a `desc_event_off_wrap` (virtio 1.2 §2.8.14), and in each half of a base (vhost-user: "Vring
/// descriptor indices for packed virtqueues").
const WRAP: u16 = 1 << 15;

/// Size of a descriptor, and offsets of its fields (virtio 1.2 §2.8.13).
const DESCRIPTOR: usize = 16;
const LEN: usize = 8;
const ID: usize = 12;
const FLAGS: usize = 14;

// desc_event_flags, virtio 1.2 §2.8.14. Both fields of the structure are accessed as one word, `off_wrap` in the lower half.
const EVENT_FLAGS_DISABLE: u16 = 1;
const EVENT_FLAGS_DESC: u16 = 2;
const EVENT_FLAGS_MASK: u16 = 3;

/// A position in the ring, with its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    slot: u16,
    wrap: bool,
}

impl Position {
    /// Decodes `desc_event_off_wrap` or half of a base. `None` if the ring is too short.
    #[inline]
    fn from_raw(raw: u16, size: u16) -> Option<Self> {
        let slot = raw & !WRAP;
        (slot < size).then_some(Self { slot, wrap: raw & WRAP != 0 })
    }

    #[inline]
    fn raw(self) -> u16 {
        self.slot | if self.wrap { WRAP } else { 0 }
    }

    #[inline]
    fn offset(self) -> usize {
        DESCRIPTOR * usize::from(self.slot)
    }

    /// The position `by` descriptors later; `by` ≤ `size`.
    #[inline]
    fn advance(self, by: u16, size: u16) -> Self {
        let slot = self.slot + by;
        if slot < size { Self { slot, ..self } } else { Self { slot: slot - size, wrap: !self.wrap } }
    }

    /// How many descriptors `later` is ahead, modulo two rounds.
    #[inline]
    fn distance(self, later: Self, size: u16) -> u16 {
        match (self.wrap == later.wrap, later.slot >= self.slot) {
            (true, true) => later.slot - self.slot,
            (true, false) => 2 * size - (self.slot - later.slot),
            (false, _) => size + later.slot - self.slot,
        }
    }
}

/// Used descriptors that are completely written except for the first one's flags, which publish them all.
#[derive(Clone, Copy)]
struct Unpublished {
    offset: usize,
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
        })
    }

    pub fn track(&mut self, _region: &InflightRegion) -> Result<Tracking, Contradiction> {
        Ok(Tracking::Off)
    }

    pub fn has_recovered(&self) -> bool {
        false
    }

    pub fn take_recovered(&mut self, _guest: &mut GuestMemoryView, _chain: &mut Chain) -> bool {
        false
    }

    pub fn forget_recovered(&mut self) {}

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

    /// The flags of the next descriptor, if it is available. An acquire load: all that the driver wrote before is visible.
    #[inline]
    fn offered(&self) -> Option<u16> {
        if self.taken == self.size {
            return None; // the next descriptor is one that we have taken
        }
        let flags = self.desc.load_acquire_u16(self.next_avail.offset() + FLAGS);
        let wrap = self.next_avail.wrap;
        ((flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap).then_some(flags)
    }

    /// Takes the next chain. Returns false if there is none.
    ///
    /// # Errors
    /// [`RingFault::Endless`]. Nothing has been taken.
    #[inline]
    pub fn take(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> Result<bool, RingFault> {
        let Some(flags) = self.offered() else { return Ok(false) };
        let (descriptors, size, start) = (&self.descriptors, self.size, self.next_avail);
        let limits = WalkLimits { size: size - self.taken, indirect: self.indirect, longest_table: MAX_SIZE };
        // Only the first descriptor's flags tell availability, because the driver writes them last (virtio 1.2 §2.8.21). They
        // are not read again.
        let entry = |n| {
            let descriptor = PackedDescriptor::from_words(descriptors.read(start.advance(n, size).slot.into()));
            if n == 0 { descriptor.with_flags(flags) } else { descriptor }
        };
        if !chain.fill_packed(&limits, entry, guest) {
            return Err(RingFault::Endless { slot: start.slot, room: limits.size });
        }
        let entries = chain.head().entries();
        self.next_avail = start.advance(entries, size);
        self.taken += entries;
        Ok(true)
    }

    /// Reads the next chain, without taking it. `None` if it does not have the fast shape.
    #[inline]
    pub fn peek_fast(&self, guest: &mut GuestMemoryView) -> Option<FastRequest> {
        let flags = self.offered()?;
        let entry = |n| self.descriptors.read(self.next_avail.advance(n, self.size).slot.into());
        // As in `take`, use the flags read by `offered`.
        let [addr, rest] = entry(0);
        let (first, id) = FastDescriptor::packed([addr, rest & !(0xffff << 48) | u64::from(flags) << 48]);
        if first.is_linked() && self.size - self.taken >= 3 {
            let [(data, _), (status, id)] = [1, 2].map(|n| FastDescriptor::packed(entry(n)));
            let linked = data.is_linked() && !status.is_linked();
            return if linked { FastRequest::new(Head::new(id, 3), [first, data, status]) } else { None };
        }
        let table = guest.descriptors(first.table().filter(|_| self.indirect)?, 3)?;
        FastRequest::new(Head::new(id, 1), [0, 1, 2].map(|n| FastDescriptor::packed(table.read(n)).0))
    }

    /// Takes the chain that [`Self::peek_fast`] returned, of `entries` descriptors.
    #[inline]
    pub fn take_fast(&mut self, entries: u16) {
        self.next_avail = self.next_avail.advance(entries, self.size);
        self.taken += entries;
    }

    /// Returns a chain with `len` bytes written to it. The driver sees it after [`Self::publish`], which writes the first used
    /// descriptor's flags. The driver does not read past a descriptor that is not used.
    #[inline]
    pub fn push_used(&mut self, head: Head, len: u32) {
        let Position { wrap, .. } = self.next_used;
        let offset = self.next_used.offset();
        self.desc.write_u32(offset + LEN, len);
        self.desc.write_u16(offset + ID, head.id());
        let flags = if wrap { AVAIL | USED } else { 0 } | if len == 0 { 0 } else { WRITE };
        match &mut self.unpublished {
            Some(unpublished) => {
                self.desc.write_u16(offset + FLAGS, flags);
                unpublished.entries += head.entries();
            }
            unpublished @ None => {
                *unpublished = Some(Unpublished { offset: offset + FLAGS, flags, entries: head.entries() })
            }
        }
        self.next_used = self.next_used.advance(head.entries(), self.size);
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
        if let Some(Unpublished { offset, flags, entries }) = self.unpublished.take() {
            self.desc.store_release_u16(offset, flags);
            self.taken -= entries;
        }
        // The driver writes its event suppression structure, then reads used descriptors; we write those, then read the
        // structure. Without a full fence on both sides, each could miss the other's write (virtio 1.2 §2.8.22).
        fence(Ordering::SeqCst);
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
        // Write the event suppression structure before the last poll, as the driver does before it reads used descriptors.
        fence(Ordering::SeqCst);
    }

    /// Suppresses the driver's kicks. With EVENT_IDX too, because the next round passes an old event position again.
    pub fn disarm(&self) {
        self.device_event.write_u32(0, u32::from(EVENT_FLAGS_DISABLE) << 16);
    }
}

/// Decodes a base: next available and next used (vhost-user: "Vring descriptor indices for packed virtqueues"). DPDK leaves the
/// upper half zero. Both positions are then equal, because a stopped ring has returned all its chains.
fn positions(base: u32, size: u16) -> Option<(Position, Position)> {
    let [a, b, c, d] = base.to_le_bytes();
    let (avail, used) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let next_avail = Position::from_raw(avail, size)?;
    let next_used = if used == 0 { next_avail } else { Position::from_raw(used, size)? };
    (next_used.distance(next_avail, size) <= size).then_some((next_avail, next_used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_repeat_after_two_rounds() {
        for size in [1, 2, 3, 7, 1024] {
            let start = Position { slot: 0, wrap: true };
            let mut at = start;
            for step in 0..2 * size {
                assert_eq!(start.distance(at, size), step, "size {size}");
                assert_eq!(Position::from_raw(at.raw(), size), Some(at));
                for by in [0, 1, size / 2, size] {
                    assert_eq!(at.distance(at.advance(by, size), size), by, "size {size} at {at:?}");
                }
                at = at.advance(1, size);
            }
            assert_eq!(at, start);
        }
    }

    #[test]
    fn a_base_has_both_positions_or_only_the_first() {
        let at = |slot, wrap| Position { slot, wrap };
        for (base, expected) in [
            (0x8000_8000, Some((at(0, true), at(0, true)))),
            (0x8003_0001, Some((at(1, false), at(3, true)))),
            (0x0000_8000, Some((at(0, true), at(0, true)))), // DPDK at the start
            (0x0000_0004, Some((at(4, false), at(4, false)))),
            (0x8001_8001, Some((at(1, true), at(1, true)))),
            (0x8000_8005, None), // no such descriptor
            (0x8005_8000, None),
            (0x8001_8000, None), // used overtakes available
        ] {
            assert_eq!(positions(base, 5), expected, "{base:#x}");
        }
    }
}
