//! Guest memory, accessed by offset into one file.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::Error;

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

    /// New memory, all zeroes.
    pub(super) fn new(bytes: usize) -> Result<Self, Error> {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, bytes as u64)?;
        Ok(Self(Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes)?)))
    }

    /// What the front-end tells the server of it.
    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: self.0.size() as u64,
            userspace_addr: self.address(0),
            mmap_offset: 0,
            mmap_handle: self.0.file_offset().expect("a file").file().as_raw_fd(),
        }
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

    /// Zeroes all of it.
    pub(super) fn clear(&self) {
        let zeroes = vec![0; self.0.size()];
        self.write(0, &zeroes);
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.slice().write_slice(bytes, offset).expect(INSIDE);
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.slice().read_slice(bytes, offset).expect(INSIDE);
    }
}
