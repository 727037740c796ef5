//! The obligation to return a chain: each chain taken from a ring gets exactly one used entry.

use crate::addr::Gpa;
use crate::engine::virtqueue::chain::Head;

/// A chain that was taken from a ring and has no used entry yet. Dropping one is a bug.
#[must_use = "a chain taken must come back in the used ring"]
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

    /// Where the status goes; `None` if the chain has no place for it.
    #[inline]
    #[must_use]
    pub fn status(&self) -> Option<Gpa> {
        self.status
    }

    /// Ends the obligation: the caller pushes a used entry for the returned head, or gives up the ring.
    #[inline]
    pub fn complete(self) -> Head {
        let head = self.head;
        std::mem::forget(self);
        head
    }
}

impl Drop for PendingUsed {
    fn drop(&mut self) {
        log::error!("bug: the request at descriptor {} was dropped without an answer", self.head.id());
        debug_assert!(std::thread::panicking(), "a request was dropped without an answer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "dropped without an answer")]
    fn a_request_dropped_without_an_answer_is_a_bug_that_says_so() {
        drop(PendingUsed::new(Head::new(3, 1), None));
    }

    #[test]
    fn a_completed_request_may_be_dropped() {
        assert_eq!(PendingUsed::new(Head::new(3, 1), None).complete().id(), 3);
    }
}
