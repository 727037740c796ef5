//! The driver's side of a split virtqueue (virtio 1.2 §2.7). The chain of slot n begins at descriptor n · [`CHAIN`].

use std::sync::atomic::{Ordering, fence};

use super::ram::{Buffer, Ram};
use super::ring::{Areas, CHAIN, DESC};

const NEXT: u16 = 1;
/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY (§2.7.6, §2.7.8).
const NOT_NEEDED: u16 = 1;
/// Offsets in both rings: flags at 0, index, entries.
const INDEX: usize = 2;
const ENTRIES: usize = 4;

pub(super) struct Split {
    pub(super) ram: Ram,
    areas: Areas,
    size: u16,
    event_idx: bool,
    /// Next index of the available ring.
    next: u16,
    /// Published index of the available ring.
    published: u16,
    /// Next entry of the used ring to take.
    seen: u16,
}

impl Split {
    /// Bytes of the three areas.
    pub(super) fn bytes(size: u16) -> [usize; 3] {
        let size = usize::from(size);
        [size * DESC, 6 + 2 * size, 6 + 8 * size]
    }

    /// Descriptors for `depth` chains, with or without indirect tables.
    pub(super) fn size(depth: u16) -> u16 {
        (depth * CHAIN).next_power_of_two()
    }

    pub(super) fn new(ram: Ram, areas: Areas, size: u16, event_idx: bool) -> Self {
        Self { ram, areas, size, event_idx, next: 0, published: 0, seen: 0 }
    }

    #[inline]
    fn avail(&self, index: u16) -> usize {
        self.areas.driver + ENTRIES + 2 * usize::from(index & (self.size - 1))
    }

    #[inline]
    fn used(&self, index: u16) -> usize {
        self.areas.device + ENTRIES + 8 * usize::from(index & (self.size - 1))
    }

    /// Writes linked descriptors to the table at `at`. The first one has number `first`.
    #[inline]
    pub(super) fn write_table(ram: &Ram, at: usize, first: u16, buffers: &[Buffer]) {
        for (n, buffer) in (1..).zip(buffers) {
            let next = if usize::from(n) < buffers.len() { NEXT } else { 0 };
            let rest = u64::from(buffer.len) | u64::from(buffer.flags | next) << 32 | u64::from(first + n) << 48;
            let at = at + usize::from(n - 1) * DESC;
            ram.store(at, buffer.addr);
            ram.store(at + 8, rest);
        }
    }

    #[inline]
    pub(super) fn offer(&mut self, slot: u16, buffers: &[Buffer]) {
        let head = slot * CHAIN;
        Self::write_table(&self.ram, self.areas.desc + usize::from(head) * DESC, head, buffers);
        self.ram.store(self.avail(self.next), head);
        self.next = self.next.wrapping_add(1);
    }

    /// True if the device wants to be kicked.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        self.ram.store(self.areas.driver + INDEX, self.next);
        // Orders the write of the index before the read of the event suppression. The device does the opposite.
        fence(Ordering::SeqCst);
        let published = std::mem::replace(&mut self.published, self.next);
        if !self.event_idx {
            return self.ram.load::<u16>(self.areas.device) & NOT_NEEDED == 0;
        }
        let event: u16 = self.ram.load(self.areas.device + ENTRIES + 8 * usize::from(self.size));
        self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(published)
    }

    /// The slot of a used chain, and the bytes written to it. `u16::MAX` if the entry names no head.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        if self.ram.load::<u16>(self.areas.device + INDEX) == self.seen {
            return None;
        }
        let entry = self.used(self.seen);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.ram.load(entry);
        let slot = if head.is_multiple_of(CHAIN.into()) { head / u32::from(CHAIN) } else { u32::MAX };
        Some((u16::try_from(slot).unwrap_or(u16::MAX), self.ram.load(entry + 4)))
    }

    /// The published index of the used ring.
    pub(super) fn used_index(&self) -> u16 {
        self.ram.load(self.areas.device + INDEX)
    }

    /// Enables the call for the next used chain, or disables calls for a long time.
    #[inline]
    pub(super) fn request_call(&self, wanted: bool) {
        if self.event_idx {
            let index = if wanted { self.seen } else { self.seen.wrapping_add(0x7fff) };
            self.ram.store(self.areas.driver + ENTRIES + 2 * usize::from(self.size), index);
        } else {
            self.ram.store(self.areas.driver, if wanted { 0 } else { NOT_NEEDED });
        }
        if wanted {
            // Orders the write above before the caller's next look at the ring.
            fence(Ordering::SeqCst);
        }
    }

    /// Offers more chains than there are descriptors.
    pub(super) fn corrupt_ring(&mut self) {
        self.next = self.next.wrapping_add(self.size + 1);
    }
}
