//! Guest memory, accessed by offset into one file.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory, VolatileSlice};

/// Guest address at which memory starts.
const GUEST_BASE: u64 = 1 << 20;
/// An offset past the end is an error in the test itself.
const INSIDE: &str = "inside the memory";

/// A buffer of a chain: guest address, bytes, and descriptor flags without NEXT.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`Buffer::WRITABLE`], [`Buffer::TABLE`] or 0.
    pub flags: u16,
}

impl Buffer {
    /// VIRTQ_DESC_F_WRITE (virtio 1.2 §2.7.5): the device writes to it.
    pub const WRITABLE: u16 = 2;
    /// VIRTQ_DESC_F_INDIRECT: it is a table of descriptors.
    pub const TABLE: u16 = 4;
}

/// Guest memory; clones share it.
#[derive(Clone)]
pub(super) struct Ram(Arc<MmapRegion>);

impl Ram {
    pub(super) const BASE: u64 = GUEST_BASE;

    pub(super) fn new(memory: MmapRegion) -> Self {
        Self(Arc::new(memory))
    }

    #[inline]
    fn slice(&self) -> VolatileSlice<'_> {
        self.0.as_volatile_slice()
    }

    /// The front-end's address of the byte at `offset`.
    pub(super) fn address(&self, offset: usize) -> u64 {
        self.0.as_ptr() as u64 + offset as u64
    }

    /// The guest address of the byte at `offset`.
    #[inline]
    pub(super) fn guest(offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// Reads a word with acquire ordering.
    #[inline]
    pub(super) fn load<T: AtomicAccess>(&self, offset: usize) -> T {
        self.slice().load(offset, Ordering::Acquire).expect(INSIDE)
    }

    /// Writes a word with release ordering.
    #[inline]
    pub(super) fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        self.slice().store(value, offset, Ordering::Release).expect(INSIDE);
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.slice().write_slice(bytes, offset).expect(INSIDE);
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.slice().read_slice(bytes, offset).expect(INSIDE);
    }
}
