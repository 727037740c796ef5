//! What a packed ring writes to guest memory, in the log of dirty pages.

use super::{DESCRIPTOR, PackedRing};
use crate::engine::dirty_log::RingLog;

impl PackedRing {
    /// Marks what is written to the ring in `log` from now on, and all of it at once.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
        self.mark_used((0, self.size.into()));
        self.mark_device_event();
    }

    /// First slot and number of the slots in which there are unpublished used descriptors.
    #[must_use]
    pub fn unpublished(&self) -> (usize, usize) {
        let entries = self.unpublished.map_or(0, |unpublished| usize::from(unpublished.entries));
        let first = self.unpublished.map_or(0, |unpublished| usize::from(unpublished.slot));
        (first, entries)
    }

    /// Marks `count` descriptors from slot `first` on.
    pub fn mark_used(&self, (first, count): (usize, usize)) {
        let Some(log) = &self.log else { return };
        let before_end = count.min(usize::from(self.size) - first);
        log.mark_descriptors(DESCRIPTOR * first, DESCRIPTOR * before_end);
        log.mark_descriptors(0, DESCRIPTOR * (count - before_end));
    }

    pub(super) fn mark_device_event(&self) {
        if let Some(log) = &self.log {
            log.mark_used(0, 4);
        }
    }
}
