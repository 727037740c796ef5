//! Which of two processes owns the objects of an iommufd while one hands them over to the other. Both have the same objects
//! open, so each must know what it may undo when it drops one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

/// Shared by an iommufd and every object of it: they change hands at once.
#[derive(Clone)]
pub struct Ownership(Arc<AtomicU8>);

/// What this process may undo.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Everything.
    ThisProcess,
    /// What it has made itself. The rest belongs to the process from which it has received the iommufd.
    Predecessor,
    /// Nothing. All belongs to the process to which it has handed the iommufd over.
    Successor,
}

impl Ownership {
    pub(super) fn new(owner: Owner) -> Self {
        Self(Arc::new(AtomicU8::new(owner as u8)))
    }

    /// The owner now.
    #[must_use]
    pub fn owner(&self) -> Owner {
        match self.0.load(SeqCst) {
            0 => Owner::ThisProcess,
            1 => Owner::Predecessor,
            _ => Owner::Successor,
        }
    }

    /// True if this process destroys its objects when it drops them.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.owner() == Owner::ThisProcess
    }

    /// Passes everything to `owner`.
    pub fn pass_to(&self, owner: Owner) {
        self.0.store(owner as u8, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_clones_change_hands_at_once() {
        let one = Ownership::new(Owner::Predecessor);
        let other = one.clone();
        for owner in [Owner::ThisProcess, Owner::Successor, Owner::Predecessor] {
            one.pass_to(owner);
            assert_eq!((other.owner(), other.is_ours()), (owner, owner == Owner::ThisProcess));
        }
    }
}
