//! Bounce slots, for data that the device cannot access in place (odd addresses, odd lengths). They are parts of one buffer,
//! allocated when the worker starts. A command takes a slot and its completion returns it, so a free slot depends on the device
//! only.

use std::sync::Arc;

use crate::addr::{Iova, Span};
use crate::engine::guest_memory::Slot;
use crate::engine::request::BOUNCE_BYTES;
use crate::hardware::{AddressSpace, DmaBuffer, MapError};

/// Bytes of a slot: the longest bounced command.
pub(in crate::engine) const SLOT_BYTES: u32 = BOUNCE_BYTES;
/// Slots per worker.
pub(in crate::engine) const SLOTS: u32 = 16;

/// The part of a request that a slot is used for.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Piece {
    /// Index of the request in the inflight table.
    pub(in crate::engine) inflight_request: u32,
    /// Offset in the request's data, bytes.
    pub(in crate::engine) position: u64,
    /// Length, bytes.
    pub(in crate::engine) bytes: u32,
}

/// One worker's bounce slots.
pub(in crate::engine) struct Bounce {
    buffer: DmaBuffer,
    free: Vec<u32>,
    taken: Vec<Option<Piece>>,
}

impl Bounce {
    pub(in crate::engine) fn new(space: &Arc<dyn AddressSpace>) -> Result<Self, MapError> {
        let bytes = usize::try_from(SLOT_BYTES * SLOTS).expect("a small constant");
        let buffer = space.buffer(bytes)?;
        Ok(Self { buffer, free: (0..SLOTS).rev().collect(), taken: vec![None; SLOTS as usize] })
    }

    /// A slot for `piece`, if one is free.
    pub(in crate::engine) fn take(&mut self, piece: Piece) -> Option<u32> {
        debug_assert!(piece.bytes <= SLOT_BYTES, "SLOT_BYTES is the limit for Queue::extent");
        let slot = self.free.pop()?;
        self.taken[slot as usize] = Some(piece);
        Some(slot)
    }

    /// Frees a slot. Returns its use, or `None` if it was free.
    pub(in crate::engine) fn give_back(&mut self, slot: u32) -> Option<Piece> {
        let piece = self.taken.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(piece)
    }

    /// Frees every slot after a device reset.
    pub(in crate::engine) fn give_back_all(&mut self) {
        for slot in 0..SLOTS {
            self.give_back(slot);
        }
    }

    /// The IOVAs of a slot.
    pub(in crate::engine) fn span(&self, slot: u32) -> Span<Iova> {
        let start = u64::from(slot) * u64::from(SLOT_BYTES);
        self.buffer.span().slice(start, u64::from(SLOT_BYTES)).expect("the buffer holds all slots")
    }

    /// The first `bytes` of a slot in this process.
    pub(in crate::engine) fn slot(&self, slot: u32, bytes: u32) -> Slot<'_> {
        Slot { shared: self.buffer.memory(), offset: slot as usize * SLOT_BYTES as usize, len: bytes as usize }
    }
}
