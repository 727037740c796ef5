//! Descriptors of both layouts.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

// The flags are the same in both layouts.
/// VIRTQ_DESC_F_NEXT, virtio 1.2 §2.7.5.
pub(in crate::engine) const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE, virtio 1.2 §2.7.5.
pub(in crate::engine) const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT, virtio 1.2 §2.7.5.
pub(in crate::engine) const INDIRECT: u16 = 4;
/// Bytes of one descriptor.
pub(super) const DESCRIPTOR: u32 = 16;

/// One entry of a descriptor table, virtio 1.2 §2.7.5.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// A descriptor of a packed ring, as read: address; length, ID and flags.
pub(in crate::engine) type PackedWords = [u64; 2];

/// One entry of a packed ring or of its indirect tables, virtio 1.2 §2.8.13.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PackedDescriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

impl Descriptor {
    /// From two 64-bit words.
    #[inline]
    #[must_use]
    pub fn from_words(words: [u64; 2]) -> Self {
        zerocopy::transmute!(words)
    }
}

impl PackedDescriptor {
    /// From two 64-bit words.
    #[inline]
    #[must_use]
    pub fn from_words(words: [u64; 2]) -> Self {
        zerocopy::transmute!(words)
    }

    /// Replaces the flags by a value read earlier.
    #[inline]
    #[must_use]
    pub fn with_flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }
}
