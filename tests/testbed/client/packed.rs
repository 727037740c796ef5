//! The driver's side of a packed virtqueue (virtio 1.2 §2.8). The buffer ID of a chain is its slot.

use std::sync::atomic::{Ordering, fence};

use super::ram::{Buffer, Ram};
use super::ring::{Areas, CHAIN, DESC};

const NEXT: u16 = 1;
// Owner of a descriptor (§2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
// Event suppression (§2.8.14). The lower half of the word is the position, with its wrap counter in bit 15.
const DISABLE: u32 = 1 << 16;
const AT_POSITION: u32 = 2 << 16;
const WRAP: u32 = 1 << 15;

/// A position in the ring, with its wrap counter.
#[derive(Clone, Copy)]
struct Position {
    slot: u16,
    wrap: bool,
}

impl Position {
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.slot += by;
        if self.slot >= size {
            self.slot -= size;
            self.wrap = !self.wrap;
        }
    }

    /// Flags of a descriptor that is available at this position.
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
    pub(super) ram: Ram,
    areas: Areas,
    size: u16,
    event_idx: bool,
    next: Position,
    seen: Position,
    /// Number of descriptors in the chain of each slot.
    lengths: Box<[u16]>,
    /// Position of the first unpublished descriptor, and the flags that publish it.
    unpublished: Option<(Position, u16)>,
    /// Number of unpublished descriptors.
    new: u16,
}

impl Packed {
    /// Bytes of the three areas.
    pub(super) fn bytes(size: u16) -> [usize; 3] {
        [usize::from(size) * DESC, 4, 4]
    }

    /// Not a power of two, so that chains wrap around the end.
    pub(super) fn size(depth: u16) -> u16 {
        depth * CHAIN + 1
    }

    pub(super) fn new(ram: Ram, areas: Areas, size: u16, event_idx: bool) -> Self {
        let start = Position { slot: 0, wrap: true };
        let lengths = vec![0; usize::from(size / CHAIN)].into();
        Self { ram, areas, size, event_idx, next: start, seen: start, lengths, unpublished: None, new: 0 }
    }

    #[inline]
    fn desc(&self, position: Position) -> usize {
        self.areas.desc + usize::from(position.slot) * DESC
    }

    #[inline]
    fn word(buffer: &Buffer, id: u16, flags: u16) -> u64 {
        u64::from(buffer.len) | u64::from(id) << 32 | u64::from(buffer.flags | flags) << 48
    }

    /// Writes descriptors to the indirect table at `at`. Their order links them.
    #[inline]
    pub(super) fn write_table(ram: &Ram, at: usize, buffers: &[Buffer]) {
        for (n, buffer) in buffers.iter().enumerate() {
            ram.store(at + n * DESC, buffer.addr);
            ram.store(at + n * DESC + 8, Self::word(buffer, 0, 0));
        }
    }

    #[inline]
    pub(super) fn offer(&mut self, slot: u16, buffers: &[Buffer]) {
        let mut left = buffers.len();
        for buffer in buffers {
            left -= 1;
            let flags = self.next.available() | if left == 0 { 0 } else { NEXT };
            self.put(buffer, slot, flags);
        }
        self.lengths[usize::from(slot)] = u16::try_from(buffers.len()).expect("a short chain");
    }

    /// Writes one descriptor. The first unpublished one keeps its old flags until [`Self::publish`].
    #[inline]
    fn put(&mut self, buffer: &Buffer, id: u16, flags: u16) {
        let at = self.desc(self.next);
        self.ram.store(at, buffer.addr);
        if self.unpublished.is_none() {
            self.unpublished = Some((self.next, buffer.flags | flags));
            self.ram.store(at + 8, buffer.len);
            self.ram.store(at + 12, id);
        } else {
            self.ram.store(at + 8, Self::word(buffer, id, flags));
        }
        self.next.advance(1, self.size);
        self.new += 1;
    }

    /// True if the device wants to be kicked.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.unpublished.take() else { return false };
        self.ram.store(self.desc(first) + 14, flags);
        let new = std::mem::take(&mut self.new);
        // Orders the write of the flags before the read of the event suppression. The device does the opposite.
        fence(Ordering::SeqCst);
        let suppression: u32 = self.ram.load(self.areas.device);
        match suppression & (3 << 16) {
            DISABLE => false,
            AT_POSITION => {
                let mut position = first;
                (0..new).any(|_| {
                    let reached = position.word() == suppression & 0xffff;
                    position.advance(1, self.size);
                    reached
                })
            }
            _ => true,
        }
    }

    /// The slot of a used chain, and the bytes written to it. `u16::MAX` if no chain has the buffer ID.
    #[inline]
    pub(super) fn take(&mut self) -> Option<(u16, u32)> {
        let at = self.desc(self.seen);
        let flags: u16 = self.ram.load(at + 14);
        let (available, used) = (flags & AVAIL != 0, flags & USED != 0);
        if available != self.seen.wrap || used != self.seen.wrap {
            return None;
        }
        let (len, slot): (u32, u16) = (self.ram.load(at + 8), self.ram.load(at + 12));
        let Some(entries) = self.lengths.get(usize::from(slot)).copied() else { return Some((u16::MAX, len)) };
        self.seen.advance(entries, self.size);
        Some((slot, len))
    }

    /// Enables the call for the next used chain, or disables calls.
    #[inline]
    pub(super) fn request_call(&self, wanted: bool) {
        let suppression = match (wanted, self.event_idx) {
            (false, _) => DISABLE,
            (true, false) => 0,
            (true, true) => AT_POSITION | self.seen.word(),
        };
        self.ram.store(self.areas.driver, suppression);
        if wanted {
            // Orders the write above before the caller's next look at the ring.
            fence(Ordering::SeqCst);
        }
    }

    /// Offers an endless chain.
    pub(super) fn corrupt_ring(&mut self) {
        for _ in 0..self.size {
            let flags = self.next.available() | NEXT;
            self.put(&Buffer { addr: Ram::BASE, len: 16, flags: 0 }, 0, flags);
        }
    }
}
