//! Guest memory, accessed by offset into one file.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::Error;

/// Guest address at which memory starts.
const GUEST_BASE: u64 = 1 << 20;
const PAGE: usize = 4096;
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
pub(super) struct Ram(Arc<MmapRegion>, Arc<Written>);

/// The pages that the guest itself has written, as its virtual machine would know. They are not tracked until somebody asks.
struct Written {
    tracked: AtomicBool,
    pages: Box<[AtomicBool]>,
}

impl Written {
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if len != 0 && self.tracked.load(Ordering::Relaxed) {
            self.pages[offset / PAGE..=(offset + len - 1) / PAGE]
                .iter()
                .for_each(|page| page.store(true, Ordering::Relaxed));
        }
    }
}

impl Ram {
    pub(super) const BASE: u64 = GUEST_BASE;

    /// New memory, all zeroes.
    pub(super) fn new(bytes: usize) -> Result<Self, Error> {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, bytes as u64)?;
        let pages = (0..bytes.div_ceil(PAGE)).map(|_| AtomicBool::new(false)).collect();
        let written = Written { tracked: AtomicBool::new(false), pages };
        Ok(Self(Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes)?), Arc::new(written)))
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
        self.1.mark(offset, size_of::<T>());
    }

    /// Size, bytes.
    pub(super) fn size(&self) -> usize {
        self.0.size()
    }

    /// The numbers of the pages that the guest has written since the last call. The first call finds none.
    pub(super) fn take_written(&self) -> Vec<usize> {
        self.1.tracked.store(true, Ordering::Relaxed);
        let pages = self.1.pages.iter().enumerate();
        pages.filter(|(_, page)| page.swap(false, Ordering::Relaxed)).map(|(number, _)| number).collect()
    }

    /// Zeroes all of it.
    pub(super) fn clear(&self) {
        let zeroes = vec![0; self.0.size()];
        self.write(0, &zeroes);
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        self.slice().write_slice(bytes, offset).expect(INSIDE);
        self.1.mark(offset, bytes.len());
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.slice().read_slice(bytes, offset).expect(INSIDE);
    }
}
