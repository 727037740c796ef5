//! A packed virtqueue as the guest's driver sees it (virtio 1.2 §2.8). The buffer ID of a chain is its slot.

use std::sync::atomic::{Ordering, fence};

use super::ram::{Part, Ram};
use super::ring::{Areas, CHAIN, DESC};

const NEXT: u16 = 1;
// Whose a descriptor is (§2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
// Event suppression (§2.8.14); the place stands in the lower half of the word, its wrap counter in bit 15.
const DISABLE: u32 = 1 << 16;
const AT_PLACE: u32 = 2 << 16;
const WRAP: u32 = 1 << 15;

/// A place in the ring, and the wrap counter of its round.
#[derive(Clone, Copy)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.slot += by;
        if self.slot >= size {
            self.slot -= size;
            self.wrap = !self.wrap;
        }
    }

    /// Flags of a descriptor that is made available here.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    #[inline]
    fn word(self) -> u32 {
        u32::from(self.slot) | if self.wrap { WRAP } else { 0 }
    }
}

pub(super) struct Packed {
    ram: Ram,
    at: Areas,
    size: u16,
    event_idx: bool,
    next: Place,
    seen: Place,
    /// How many descriptors each slot's chain has.
    lengths: Box<[u16]>,
    /// Where the chains begin that the device does not see yet, and the flags it waits for; how many descriptors they have.
    hidden: Option<(Place, u16)>,
    new: u16,
}

impl Packed {
    /// Bytes of the three areas.
    pub(super) fn bytes(size: u16) -> [usize; 3] {
        [usize::from(size) * DESC, 4, 4]
    }

    /// No power of two, so that chains run over the end.
    pub(super) fn size(depth: u16) -> u16 {
        depth * CHAIN + 1
    }

    pub(super) fn new(ram: Ram, at: Areas, size: u16, event_idx: bool) -> Self {
        let start = Place { slot: 0, wrap: true };
        let lengths = vec![0; usize::from(size / CHAIN)].into();
        Self { ram, at, size, event_idx, next: start, seen: start, lengths, hidden: None, new: 0 }
    }

    #[inline]
    fn desc(&self, place: Place) -> usize {
        self.at.desc + usize::from(place.slot) * DESC
    }

    #[inline]
    fn word(part: &Part, id: u16, flags: u16) -> u64 {
        u64::from(part.len) | u64::from(id) << 32 | u64::from(part.flags | flags) << 48
    }

    /// Writes descriptors to the table at `at`, where their order is their link.
    #[inline]
    pub(super) fn write_table(ram: &Ram, at: usize, parts: &[Part]) {
        for (n, part) in parts.iter().enumerate() {
            ram.store(at + n * DESC, part.addr);
            ram.store(at + n * DESC + 8, Self::word(part, 0, 0));
        }
    }

    #[inline]
    pub(super) fn offer(&mut self, slot: u16, parts: &[Part]) {
        let mut left = parts.len();
        for part in parts {
            left -= 1;
            let flags = self.next.available() | if left == 0 { 0 } else { NEXT };
            self.put(part, slot, flags);
        }
        self.lengths[usize::from(slot)] = u16::try_from(parts.len()).expect("a short chain");
    }

    /// Writes one descriptor; the first of those that are new keeps its former flags.
    #[inline]
    fn put(&mut self, part: &Part, id: u16, flags: u16) {
        let at = self.desc(self.next);
        self.ram.store(at, part.addr);
        if self.hidden.is_none() {
            self.hidden = Some((self.next, part.flags | flags));
            self.ram.store(at + 8, part.len);
            self.ram.store(at + 12, id);
        } else {
            self.ram.store(at + 8, Self::word(part, id, flags));
        }
        self.next.advance(1, self.size);
        self.new += 1;
    }

    /// True if the device wants to be kicked.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else { return false };
        self.ram.store(self.desc(first) + 14, flags);
        let new = std::mem::take(&mut self.new);
        // The descriptor is seen before the device's wish is read; the device does the two in the other order.
        fence(Ordering::SeqCst);
        let wish: u32 = self.ram.load(self.at.device);
        match wish & (3 << 16) {
            DISABLE => false,
            AT_PLACE => {
                let mut place = first;
                (0..new).any(|_| {
                    let reached = place.word() == wish & 0xffff;
                    place.advance(1, self.size);
                    reached
                })
            }
            _ => true,
        }
    }

    /// The slot of a chain that has come back, and the bytes written to it.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        let at = self.desc(self.seen);
        let flags: u16 = self.ram.load(at + 14);
        let (available, used) = (flags & AVAIL != 0, flags & USED != 0);
        if available != self.seen.wrap || used != self.seen.wrap {
            return None;
        }
        let (len, slot): (u32, u16) = (self.ram.load(at + 8), self.ram.load(at + 12));
        let entries = self.lengths.get(usize::from(slot)).copied().expect("a buffer ID that was offered");
        self.seen.advance(entries, self.size);
        Some((slot, len))
    }

    /// Asks for a call at the next chain that comes back, or at none.
    #[inline]
    pub(super) fn want_call(&self, wanted: bool) {
        let wish = match (wanted, self.event_idx) {
            (false, _) => DISABLE,
            (true, false) => 0,
            (true, true) => AT_PLACE | self.seen.word(),
        };
        self.ram.store(self.at.driver, wish);
        if wanted {
            // The wish is seen before the caller's last look.
            fence(Ordering::SeqCst);
        }
    }

    /// Offers a chain without an end.
    pub(super) fn break_rules(&mut self) {
        for _ in 0..self.size {
            let flags = self.next.available() | NEXT;
            self.put(&Part { addr: Ram::BASE, len: 16, flags: 0 }, 0, flags);
        }
    }
}
