//! How a chain is found in the record of a packed ring.

use zerocopy::FromZeros;

/// `free_head` and `old_free_head` of the record, which are neighbours there.
#[derive(Clone, Copy, FromZeros)]
pub(super) struct FreeHeads(u32);

impl FreeHeads {
    #[inline]
    pub(super) fn new(head: u16, old: u16) -> Self {
        Self(u32::from(head) | u32::from(old) << 16)
    }

    /// As they are between publications.
    #[inline]
    pub(super) fn both(entry: u16) -> Self {
        Self::new(entry, entry)
    }

    /// The free head.
    #[inline]
    pub(super) fn entry(self) -> u16 {
        u16::try_from(self.0 & 0xffff).expect("masked")
    }

    #[inline]
    pub(super) fn word(self) -> u32 {
        self.0
    }
}

/// Where a chain is recorded: its first entry, and above it the successor that its last entry had in the list of free entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromZeros)]
pub struct Recorded(u32);

impl Recorded {
    #[inline]
    pub(super) fn new(first: u16, after: FreeHeads) -> Self {
        Self(u32::from(first) | after.0 & 0xffff_0000)
    }

    /// Of a chain whose last entry has no successor.
    #[inline]
    #[must_use]
    pub fn without_end(first: u16) -> Self {
        Self(u32::from(first) | 0xffff_0000)
    }

    /// The one with the word returned by [`Self::word`].
    #[inline]
    #[must_use]
    pub fn from_word(word: u32) -> Self {
        Self(word)
    }

    /// Identifies it.
    #[inline]
    #[must_use]
    pub fn word(self) -> u32 {
        self.0
    }

    #[inline]
    pub(super) fn first(self) -> u16 {
        u16::try_from(self.0 & 0xffff).expect("masked")
    }

    #[inline]
    pub(super) fn after(self) -> u16 {
        u16::try_from(self.0 >> 16).expect("shifted")
    }
}
