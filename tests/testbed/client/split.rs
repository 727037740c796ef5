//! A split virtqueue as the guest's driver sees it (virtio 1.2 §2.7). The chain of slot n begins at descriptor
//! n · [`CHAIN`].

use std::sync::atomic::{Ordering, fence};

use super::ram::{Part, Ram};
use super::ring::{Areas, CHAIN, DESC};

const NEXT: u16 = 1;
/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY (§2.7.6, §2.7.8).
const NOT_NEEDED: u16 = 1;
/// Places in both rings: flags, index, entries.
const INDEX: usize = 2;
const ENTRIES: usize = 4;

pub(super) struct Split {
    ram: Ram,
    at: Areas,
    size: u16,
    event_idx: bool,
    /// Next index of the available ring; what has been published; the device's index as last read.
    next: u16,
    published: u16,
    seen: u16,
}

impl Split {
    /// Bytes of the three areas.
    pub(super) fn bytes(size: u16) -> [usize; 3] {
        let size = usize::from(size);
        [size * DESC, 6 + 2 * size, 6 + 8 * size]
    }

    /// With room for the descriptors of `depth` chains, whether or not they lie in tables.
    pub(super) fn size(depth: u16) -> u16 {
        (depth * CHAIN).next_power_of_two()
    }

    pub(super) fn new(ram: Ram, at: Areas, size: u16, event_idx: bool) -> Self {
        Self { ram, at, size, event_idx, next: 0, published: 0, seen: 0 }
    }

    #[inline]
    fn avail(&self, index: u16) -> usize {
        self.at.driver + ENTRIES + 2 * usize::from(index & (self.size - 1))
    }

    #[inline]
    fn used(&self, index: u16) -> usize {
        self.at.device + ENTRIES + 8 * usize::from(index & (self.size - 1))
    }

    /// Writes linked descriptors to the table at `at`, numbered from `first` on.
    #[inline]
    pub(super) fn write_table(ram: &Ram, at: usize, first: u16, parts: &[Part]) {
        for (n, part) in (1..).zip(parts) {
            let next = if usize::from(n) < parts.len() { NEXT } else { 0 };
            let rest = u64::from(part.len) | u64::from(part.flags | next) << 32 | u64::from(first + n) << 48;
            let at = at + usize::from(n - 1) * DESC;
            ram.store(at, part.addr);
            ram.store(at + 8, rest);
        }
    }

    #[inline]
    pub(super) fn offer(&mut self, slot: u16, parts: &[Part]) {
        let head = slot * CHAIN;
        Self::write_table(&self.ram, self.at.desc + usize::from(head) * DESC, head, parts);
        self.ram.store(self.avail(self.next), head);
        self.next = self.next.wrapping_add(1);
    }

    /// True if the device wants to be kicked.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        self.ram.store(self.at.driver + INDEX, self.next);
        // The index is seen before the device's wish is read; the device does the two in the other order.
        fence(Ordering::SeqCst);
        let published = std::mem::replace(&mut self.published, self.next);
        if !self.event_idx {
            return self.ram.load::<u16>(self.at.device) & NOT_NEEDED == 0;
        }
        let event: u16 = self.ram.load(self.at.device + ENTRIES + 8 * usize::from(self.size));
        self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(published)
    }

    /// The slot of a chain that has come back, and the bytes written to it.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        if self.ram.load::<u16>(self.at.device + INDEX) == self.seen {
            return None;
        }
        let entry = self.used(self.seen);
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.ram.load(entry);
        assert!(head.is_multiple_of(CHAIN.into()), "descriptor {head} was no head");
        Some((u16::try_from(head / u32::from(CHAIN)).expect("a head"), self.ram.load(entry + 4)))
    }

    /// Asks for a call at the next chain that comes back, or at none for a long time.
    #[inline]
    pub(super) fn want_call(&self, wanted: bool) {
        if self.event_idx {
            let index = if wanted { self.seen } else { self.seen.wrapping_add(0x7fff) };
            self.ram.store(self.at.driver + ENTRIES + 2 * usize::from(self.size), index);
        } else {
            self.ram.store(self.at.driver, if wanted { 0 } else { NOT_NEEDED });
        }
        if wanted {
            // The wish is seen before the caller's last look.
            fence(Ordering::SeqCst);
        }
    }

    /// Offers more chains than there are descriptors.
    pub(super) fn break_rules(&mut self) {
        self.next = self.next.wrapping_add(self.size + 1);
    }
}
