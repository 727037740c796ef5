//! Indices of free slots, as a stack: the list page of the slot used last is most likely in the CPU cache. It is an array
//! inside the queue pair, so that it lies on the queue pair's cache lines. Every `u8` is an index in it, so none has to be
//! checked.

use super::MAX_DEPTH;

/// See the top of this file.
pub(super) struct FreeSlots {
    list: [u8; MAX_DEPTH as usize],
    len: u8,
}

impl FreeSlots {
    /// All of `slots`, the first one on top.
    pub(super) fn new(slots: u8) -> Self {
        let mut all = Self { list: [0; MAX_DEPTH as usize], len: 0 };
        (0..slots).rev().for_each(|slot| all.push(slot));
        all
    }

    /// The slot that [`Self::pop`] takes away.
    #[inline]
    pub(super) fn top(&self) -> Option<u8> {
        let top = self.len.checked_sub(1)?;
        Some(self.list[usize::from(top)])
    }

    /// Takes the top away. There must be one.
    #[inline]
    pub(super) fn pop(&mut self) {
        self.len -= 1;
    }

    /// Puts a slot on top. Each slot is there once at most, so there is room.
    #[inline]
    pub(super) fn push(&mut self, slot: u8) {
        self.list[usize::from(self.len)] = slot;
        self.len += 1;
    }

    /// How many.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len.into()
    }
}
