//! Command identifiers. Each queue has its own, unless a controller wants them to be different in all queues and below the
//! size of a queue.

use super::queue::SLOT_BITS;

/// Entries of the admin queue, and identifiers that it uses if they are shared.
pub(super) const ADMIN_TAGS: u16 = 32;

/// Whose the command identifiers of an I/O queue are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tags {
    /// The queue's own: slot and generation.
    Own,
    /// The controller's: the slot alone, after those of the admin queue. Only one I/O queue can have them.
    Shared,
}

impl Tags {
    /// The identifier of slot 0, and what is added to that of a slot for its next command.
    pub(super) fn numbering(self) -> (u16, u16) {
        match self {
            Self::Own => (0, 1 << SLOT_BITS),
            Self::Shared => (ADMIN_TAGS, 0),
        }
    }
}
