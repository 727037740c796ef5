//! What is owed for a chain taken: the proof that each gets its used entry, once.

use super::chain::Head;
use crate::addr::Gpa;

/// A chain taken from a ring and owed a used entry.
#[must_use = "a chain taken must come back in the used ring"]
#[derive(Debug)]
pub struct Ticket {
    head: Head,
    status: Option<Gpa>,
}

impl Ticket {
    #[inline]
    pub(super) fn new(head: Head, status: Option<Gpa>) -> Self {
        Self { head, status }
    }

    /// Where the status goes; `None` if the chain has no place for it.
    #[inline]
    #[must_use]
    pub fn status(&self) -> Option<Gpa> {
        self.status
    }

    /// Ends the debt: the caller puts the head returned into the used ring, or gives the ring up.
    #[inline]
    pub fn settle(self) -> Head {
        let head = self.head;
        std::mem::forget(self);
        head
    }
}

impl Drop for Ticket {
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
        drop(Ticket::new(Head::new(3, 1), None));
    }

    #[test]
    fn a_request_that_is_settled_may_go() {
        assert_eq!(Ticket::new(Head::new(3, 1), None).settle().id(), 3);
    }
}
