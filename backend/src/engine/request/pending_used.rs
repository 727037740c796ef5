//! Ensures that each chain taken from a ring gets exactly one used entry.

use crate::addr::Gpa;
use crate::engine::virtqueue::chain::Head;

/// A chain that was taken from a ring and has no used entry yet. Dropping it is a bug.
#[must_use = "each chain taken needs a used entry"]
#[derive(Debug)]
pub struct PendingUsed {
    head: Head,
    status: Option<Gpa>,
}

impl PendingUsed {
    #[inline]
    pub(in crate::engine) fn new(head: Head, status: Option<Gpa>) -> Self {
        Self { head, status }
    }

    /// The address of the status byte. `None` if the chain has none.
    #[inline]
    #[must_use]
    pub fn status(&self) -> Option<Gpa> {
        self.status
    }

    /// The head.
    #[inline]
    pub(in crate::engine) fn head(&self) -> Head {
        self.head
    }

    /// Returns the head. The caller must push a used entry for it, or fail the ring.
    #[inline]
    pub fn complete(self) -> Head {
        let head = self.head;
        std::mem::forget(self);
        head
    }

    /// Gets no used entry from this process. The record of the ring's requests in flight says so to whoever serves the ring next.
    pub(in crate::engine) fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for PendingUsed {
    fn drop(&mut self) {
        log::error!("bug: the request at descriptor {} was dropped without a used entry", self.head.id());
        debug_assert!(std::thread::panicking(), "a request was dropped without a used entry");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped without a used entry")]
    fn dropping_a_request_without_a_used_entry_panics() {
        drop(PendingUsed::new(Head::new(3, 1), None));
    }

    #[test]
    fn a_completed_request_may_be_dropped() {
        assert_eq!(PendingUsed::new(Head::new(3, 1), None).complete().id(), 3);
    }
}
