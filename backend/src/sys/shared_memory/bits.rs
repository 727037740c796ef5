//! Single bits of shared memory, which another process clears at the same time.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{LossCounter, SharedMemory};

impl SharedMemory {
    /// Sets the bits of `mask` in the byte at `offset` atomically. Whoever sees them sees all earlier writes of this thread.
    #[inline]
    pub fn fetch_or_u8(&self, offset: usize, mask: u8) {
        #[cfg(test)]
        super::kill::before_store();
        // SAFETY: `word` checked the bounds; other writers of this byte use atomic accesses.
        unsafe { AtomicU8::from_ptr(self.word::<u8>(offset).as_ptr()) }.fetch_or(mask, Ordering::SeqCst);
    }

    /// Counts the pages of the whole mapping that are lost from now on. `None` if its file cannot be truncated
    /// ([`SharedMemory::of`]). Valid while a view of the mapping exists.
    #[must_use]
    pub fn loss_counter(&self) -> Option<LossCounter> {
        LossCounter::at(self.base.as_ptr() as usize)
    }
}
