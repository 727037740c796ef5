//! Why a record is not believed.

/// A record contradicts itself or its ring. The ring is not served, because a request could be lost or done twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its inflight region (SET_INFLIGHT_FD) cannot be believed: {0}")]
pub struct Contradiction(pub Claim);

/// What the record claims, and what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Claim {
    /// The format is unknown.
    #[error("version {version} with features {features:#x}, known is version 1 without features")]
    Format {
        /// The field.
        version: u16,
        /// The field.
        features: u64,
    },
    /// It was made for another ring size.
    #[error("it has {found} entries, SET_INFLIGHT_FD announced {entries}")]
    Entries {
        /// The field.
        found: u16,
        /// Queue size of the message.
        entries: u16,
    },
    /// The last batch is longer than the ring.
    #[error("used_idx is {recorded}, and that of a ring of {size} is {used}")]
    UsedIndex {
        /// The field.
        recorded: u16,
        /// used.idx of the ring.
        used: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// The list of the last batch leaves the array or returns to an entry.
    #[error("the list of the last batch comes to entry {0}, which does not exist or was in it before")]
    Batch(
        /// The entry.
        u16,
    ),
    /// A mark is neither 0 nor 1.
    #[error("entry {entry} is marked with {mark}")]
    Mark {
        /// The entry.
        entry: u16,
        /// The field.
        mark: u8,
    },
    /// The entry is not a descriptor of the ring.
    #[error("entry {entry} is marked in a ring of {size}")]
    Head {
        /// The entry.
        entry: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// The order of two requests is unknown, or a counter is absurd.
    #[error("the counter of entry {entry} is {counter:#x}, which is that of another or too large")]
    Counter {
        /// The entry.
        entry: u16,
        /// The field.
        counter: u64,
    },
    /// More requests than the driver has made available.
    #[error("{marked} requests are marked, and the driver has made {available} available")]
    Count {
        /// Number of marks.
        marked: u16,
        /// Requests from used.idx to avail.idx.
        available: u16,
    },
    /// A used position is not in the ring.
    #[error("a used position is {slot} with wrap counter {wrap} in a ring of {size}")]
    Position {
        /// The field.
        slot: u16,
        /// The field.
        wrap: u8,
        /// Descriptors of the ring.
        size: u16,
    },
    /// The list of free entries returns to an entry.
    #[error("the list of free entries returns to entry {0}")]
    Free(
        /// The entry.
        u16,
    ),
    /// The last publication does not fit the list of free entries.
    #[error("the used position has advanced by {advanced}, which is not the way from free entry {free_head} to {old}")]
    Freed {
        /// Descriptors.
        advanced: u16,
        /// The field.
        free_head: u16,
        /// The field `old_free_head`.
        old: u16,
    },
    /// A chain is not one.
    #[error("the chain at entry {head} breaks at entry {entry}")]
    Chain {
        /// Its first entry.
        head: u16,
        /// Where it leaves the array, crosses another list, or ends too early or too late.
        entry: u16,
    },
    /// An entry is neither free nor part of a chain.
    #[error("entry {0} is neither free nor in flight")]
    Leaked(
        /// The entry.
        u16,
    ),
    /// More descriptors than the ring has.
    #[error("the requests in flight have more descriptors than the ring, {size}")]
    Descriptors {
        /// Descriptors of the ring.
        size: u16,
    },
    /// Requests are marked, and the ring has none at the used position.
    #[error("requests are marked, and no descriptor is available at the used position, {slot}")]
    NotAvailable {
        /// The used position.
        slot: u16,
    },
    /// The base is before the used index, or after the available one.
    #[error("SET_VRING_BASE is {base}, which is not from used.idx {used} to avail.idx {avail}")]
    Base {
        /// The base.
        base: u16,
        /// used.idx of the ring.
        used: u16,
        /// avail.idx of the ring.
        avail: u16,
    },
}

impl From<Claim> for Contradiction {
    fn from(claim: Claim) -> Self {
        Self(claim)
    }
}
