//! Device registers mapped into this process. VFIO maps them uncached (on Arm as Device memory), so accesses to the registers of
//! a function keep their order among themselves. Barriers order them with memory.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::barrier;
use crate::hardware::Registers;

/// A mapped BAR, or a part of one.
pub struct Mmio {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: this value alone owns the mapping and unmaps it on drop. Device registers accept accesses from any CPU, and each
// access is one volatile instruction.
unsafe impl Send for Mmio {}
// SAFETY: as for Send.
unsafe impl Sync for Mmio {}

impl Mmio {
    /// Maps `len` bytes of a device file at `offset` for reading and writing.
    ///
    /// # Errors
    /// The errno of `mmap`.
    pub fn map(device: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address, so the new mapping overlaps no other.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, device, offset)
        }?;
        let base = NonNull::new(base.cast()).expect("mmap never returns address zero");
        Ok(Self { base, len })
    }

    #[inline]
    fn register<T>(&self, offset: usize) -> NonNull<T> {
        let size = size_of::<T>();
        assert!(
            offset.is_multiple_of(size) && offset <= self.len && size <= self.len - offset,
            "register of {size} bytes at {offset:#x} of {:#x}",
            self.len
        );
        // SAFETY: offset + size <= len, checked above; the mapping lives as long as self and is page-aligned.
        unsafe { self.base.add(offset) }.cast()
    }
}

impl Registers for Mmio {
    fn size(&self) -> usize {
        self.len
    }

    #[inline]
    fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `register` checked bounds and alignment.
        let value = u32::from_le(unsafe { self.register::<u32>(offset).read_volatile() });
        barrier::after_device_load();
        value
    }

    #[inline]
    fn read64(&self, offset: usize) -> u64 {
        // SAFETY: `register` checked bounds and alignment.
        let value = u64::from_le(unsafe { self.register::<u64>(offset).read_volatile() });
        barrier::after_device_load();
        value
    }

    #[inline]
    fn write32(&self, offset: usize, value: u32) {
        barrier::before_register_store();
        // SAFETY: `register` checked bounds and alignment.
        unsafe { self.register::<u32>(offset).write_volatile(value.to_le()) }
    }

    #[inline]
    fn write64(&self, offset: usize, value: u64) {
        barrier::before_register_store();
        // SAFETY: `register` checked bounds and alignment.
        unsafe { self.register::<u64>(offset).write_volatile(value.to_le()) }
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of this mapping, and no pointer into it outlives `self`.
        if let Err(errno) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            log::error!("munmap of {:#x} bytes of device registers: {errno}", self.len);
        }
    }
}
