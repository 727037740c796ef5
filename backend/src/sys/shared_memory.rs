//! Mapped memory that a guest or a device may write at any time: guest RAM, or a buffer shared with the device.
//!
//! Every access copies one or more machine words and is bounds-checked. `load_acquire` and `store_release` are for the words
//! that publish other memory (ring indices, the completion phase). The published memory itself needs volatile access only.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use vm_memory::MmapRegion;
use zerocopy::{FromBytes, IntoBytes};

use super::sigbus::{LossCounter, Watch, lost_pages_at};

mod array;
mod bits;
#[cfg(test)]
pub(crate) mod kill;
mod line;
mod run;

pub use array::{SharedArray, SharedEntry, SharedRing, Word};
pub use line::Line;
pub use run::SharedRun;

/// A bounds-checked view of shared memory. It keeps the mapping alive and is cheap to clone.
///
/// An offset past the end or a misaligned atomic access panics. Callers check guest-supplied ranges *before* they get a view
/// (see `memory::MemTable::host_memory`), so a bad offset here is a bug in this program.
#[derive(Clone)]
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `_owner`, which is Send + Sync, keeps the mapping alive. All access is volatile or atomic, so a race between
// threads can at worst produce a torn value, just as a racing guest or device can.
unsafe impl Send for SharedMemory {}
// SAFETY: as for Send; every method takes `&self`.
unsafe impl Sync for SharedMemory {}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes)", self.len)
    }
}

impl SharedMemory {
    /// A view of a whole mapping.
    ///
    /// # Panics
    /// If the mapping starts at address zero, which `mmap` never gives.
    #[must_use]
    pub fn of(region: Arc<MmapRegion<()>>) -> Self {
        let base = NonNull::new(region.as_ptr()).expect("mmap never returns address zero");
        let len = region.size();
        Self { base, len, _owner: region }
    }

    /// Like [`Self::of`], for a file mapping whose file may be truncated. Lost pages then read as zero. `page` is the page
    /// size of the mapping in bytes.
    ///
    /// # Errors
    /// ENOSPC if too many mappings are watched, or the errno of installing the SIGBUS handler.
    ///
    /// # Panics
    /// As [`Self::of`].
    pub fn of_truncatable(region: MmapRegion<()>, page: usize) -> io::Result<Self> {
        let base = NonNull::new(region.as_ptr()).expect("mmap never returns address zero");
        let len = region.size();
        let watch = Watch::new(base.as_ptr() as usize, len, page)?;
        // The watch is dropped before the mapping: afterwards the addresses may belong to another mapping.
        Ok(Self { base, len, _owner: Arc::new((watch, region)) })
    }

    /// Number of pages of the whole mapping that were lost, because its file was truncated, and accessed since.
    #[must_use]
    pub fn lost_pages(&self) -> usize {
        lost_pages_at(self.base.as_ptr() as usize)
    }

    /// A view of `len` bytes at `offset`; `None` if they are not all inside.
    #[inline]
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len, checked above, so the result is inside (or one past) the mapping.
        let base = unsafe { self.base.add(offset) };
        Some(Self { base, len, _owner: Arc::clone(&self._owner) })
    }

    /// Size in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if the size is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A weak reference to the mapping. Once it has no strong count, the addresses may belong to another mapping.
    pub(crate) fn mapping(&self) -> Weak<dyn Any + Send + Sync> {
        Arc::downgrade(&self._owner)
    }

    /// Start address in this process: for system calls that take an address, and to compare views.
    pub(crate) fn host_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Pointer to a word of type `T` at `offset`. It checks bounds and alignment for all accessors.
    #[inline]
    fn word<T>(&self, offset: usize) -> NonNull<T> {
        let size = size_of::<T>();
        self.check(offset, size);
        // SAFETY: offset + size <= len, checked above; the mapping lives as long as `_owner`.
        let pointer = unsafe { self.base.add(offset) }.cast::<T>();
        if !pointer.is_aligned() {
            self.misaligned(offset, size);
        }
        pointer
    }

    /// True if the `len` bytes at `offset` are all inside.
    #[inline]
    #[must_use]
    pub fn contains(&self, offset: usize, len: usize) -> bool {
        self.len.checked_sub(len).is_some_and(|last| offset <= last)
    }

    /// Panics unless the `len` bytes at `offset` are inside.
    #[inline]
    fn check(&self, offset: usize, len: usize) {
        if !self.contains(offset, len) {
            self.outside(offset, len);
        }
    }

    // Out of line, with arguments by value: otherwise each access would prepare the message's arguments on the stack.
    #[cold]
    #[inline(never)]
    fn outside(&self, offset: usize, len: usize) -> ! {
        panic!("{len} bytes at {offset} of {self:?}")
    }

    #[cold]
    #[inline(never)]
    fn misaligned(&self, offset: usize, len: usize) -> ! {
        panic!("{len} bytes at {offset} of {self:?} are misaligned")
    }

    /// Reads one byte.
    #[inline]
    #[must_use]
    pub fn read_u8(&self, offset: usize) -> u8 {
        // SAFETY: `word` checked bounds and alignment.
        unsafe { self.word::<u8>(offset).read_volatile() }
    }

    /// Writes one byte.
    #[inline]
    pub fn write_u8(&self, offset: usize, value: u8) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: `word` checked bounds and alignment.
        unsafe { self.word::<u8>(offset).write_volatile(value) }
    }

    /// Reads a little-endian 16-bit word without ordering.
    #[inline]
    #[must_use]
    pub fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: `word` checked bounds and alignment.
        u16::from_le(unsafe { self.word::<u16>(offset).read_volatile() })
    }

    /// Writes a little-endian 16-bit word without ordering.
    #[inline]
    pub fn write_u16(&self, offset: usize, value: u16) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: `word` checked bounds and alignment.
        unsafe { self.word::<u16>(offset).write_volatile(value.to_le()) }
    }

    /// Reads a little-endian 32-bit word without ordering.
    #[inline]
    #[must_use]
    pub fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: `word` checked bounds and alignment.
        u32::from_le(unsafe { self.word::<u32>(offset).read_volatile() })
    }

    /// Writes a little-endian 32-bit word without ordering.
    #[inline]
    pub fn write_u32(&self, offset: usize, value: u32) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: `word` checked bounds and alignment.
        unsafe { self.word::<u32>(offset).write_volatile(value.to_le()) }
    }

    /// Reads a little-endian 64-bit word without ordering.
    #[inline]
    #[must_use]
    pub fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: `word` checked bounds and alignment.
        u64::from_le(unsafe { self.word::<u64>(offset).read_volatile() })
    }

    /// Writes a little-endian 64-bit word without ordering.
    #[inline]
    pub fn write_u64(&self, offset: usize, value: u64) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: `word` checked bounds and alignment.
        unsafe { self.word::<u64>(offset).write_volatile(value.to_le()) }
    }

    /// Reads a little-endian 16-bit word with acquire ordering: later reads of this thread see everything that the writer
    /// had stored before the word.
    #[inline]
    #[must_use]
    pub fn load_acquire_u16(&self, offset: usize) -> u16 {
        // SAFETY: `word` checked bounds and alignment; other writers of this word use atomic or device-sized stores.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.word::<u16>(offset).as_ptr()) }.load(Ordering::Acquire))
    }

    /// Writes a little-endian 16-bit word with release ordering: after all earlier writes of this thread.
    #[inline]
    pub fn store_release_u16(&self, offset: usize, value: u16) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: as for `load_acquire_u16`.
        unsafe { AtomicU16::from_ptr(self.word::<u16>(offset).as_ptr()) }.store(value.to_le(), Ordering::Release);
    }

    /// Writes a little-endian 64-bit word with release ordering: after all earlier writes of this thread.
    #[inline]
    pub fn store_release_u64(&self, offset: usize, value: u64) {
        #[cfg(test)]
        kill::before_store();
        // SAFETY: as for `load_acquire_u16`.
        unsafe { AtomicU64::from_ptr(self.word::<u64>(offset).as_ptr()) }.store(value.to_le(), Ordering::Release);
    }

    /// Reads a little-endian 64-bit word with acquire ordering; see [`Self::load_acquire_u16`].
    #[inline]
    #[must_use]
    pub fn load_acquire_u64(&self, offset: usize) -> u64 {
        // SAFETY: as for `load_acquire_u16`.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.word::<u64>(offset).as_ptr()) }.load(Ordering::Acquire))
    }

    /// Reads a wire structure. Where the offset is aligned, a structure of whole 64-bit words (a descriptor, a queue entry) is
    /// read word by word, each word once. A concurrent writer may still tear it between words.
    #[inline]
    #[must_use]
    pub fn read<T: FromBytes + IntoBytes>(&self, offset: usize) -> T {
        let size = size_of::<T>();
        let mut value = T::new_zeroed();
        if self.words(offset, size) * 8 == size {
            self.copy_words(offset, value.as_mut_bytes());
            return value;
        }
        self.read_bytes(offset)
    }

    /// [`Self::read`] where word accesses are impossible. Out of line, so that its byte stores do not make the compiler build
    /// the fast path's value from bytes.
    #[cold]
    fn read_bytes<T: FromBytes + IntoBytes>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.copy_to(offset, value.as_mut_bytes());
        value
    }

    /// Reads `bytes.len() / 8` words at `offset`. [`Self::words`] must have allowed them.
    #[inline]
    fn copy_words(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: `words` checked that `bytes.len()` bytes at `offset` are inside.
        let from = unsafe { self.base.add(offset) }.cast::<u64>();
        for (i, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            // SAFETY: inside, see above; `words` returns 0 for unaligned offsets.
            let word = unsafe { from.add(i).read_volatile() };
            // One store per word. Through a byte array the compiler emits eight stores, and a field read right afterwards
            // stalls on all of them (failed store forwarding).
            // SAFETY: a chunk has exactly eight bytes; the store needs no alignment.
            unsafe { chunk.as_mut_ptr().cast::<u64>().write_unaligned(word) };
        }
    }

    /// Writes a wire structure; the counterpart of [`Self::read`].
    #[inline]
    pub fn write<T: IntoBytes + zerocopy::Immutable>(&self, offset: usize, value: &T) {
        self.copy_from(offset, value.as_bytes());
    }

    /// Reads `N` little-endian words, each once.
    #[inline]
    #[must_use]
    pub fn read_words<const N: usize>(&self, offset: usize) -> [u64; N] {
        let from = self.word::<[u64; N]>(offset).cast::<u64>();
        // SAFETY: `word` checked that all N are inside and aligned.
        std::array::from_fn(|i| u64::from_le(unsafe { from.add(i).read_volatile() }))
    }

    /// Copies `bytes.len()` bytes at `offset` into `bytes`.
    #[inline]
    pub fn copy_to(&self, offset: usize, bytes: &mut [u8]) {
        let words = self.words(offset, bytes.len());
        let (head, tail) = bytes.split_at_mut(words * 8);
        self.copy_words(offset, head);
        for (i, byte) in tail.iter_mut().enumerate() {
            *byte = self.read_u8(offset + words * 8 + i);
        }
    }

    /// Copies `bytes` to `offset`.
    #[inline]
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let words = self.words(offset, bytes.len());
        let (head, tail) = bytes.split_at(words * 8);
        // SAFETY: `words` checked that `bytes.len()` bytes at `offset` are inside.
        let to = unsafe { self.base.add(offset) }.cast::<u64>();
        for (i, chunk) in head.chunks_exact(8).enumerate() {
            // SAFETY: a chunk has exactly eight bytes; the load needs no alignment.
            let word = unsafe { chunk.as_ptr().cast::<u64>().read_unaligned() };
            // SAFETY: inside, see above; `words` returns 0 for unaligned offsets.
            unsafe { to.add(i).write_volatile(word) };
        }
        for (i, byte) in tail.iter().enumerate() {
            self.write_u8(offset + words * 8 + i, *byte);
        }
    }

    /// How many 64-bit word accesses a copy of `len` bytes at `offset` can use: `len / 8` if aligned, else 0.
    #[inline]
    fn words(&self, offset: usize, len: usize) -> usize {
        self.check(offset, len);
        if (self.base.as_ptr() as usize + offset).is_multiple_of(8) { len / 8 } else { 0 }
    }

    /// Copies `len` bytes to other shared memory, for example between guest RAM and a bounce buffer.
    pub fn copy_to_shared(&self, offset: usize, target: &Self, target_offset: usize, len: usize) {
        let words = self.words(offset, len).min(target.words(target_offset, len));
        // SAFETY: `words` checked that the `len` bytes are inside both views.
        let (from, to) = unsafe { (self.base.add(offset), target.base.add(target_offset)) };
        let (from_words, to_words) = (from.cast::<u64>(), to.cast::<u64>());
        for i in 0..words {
            // SAFETY: 8 * words <= len, and `words` is nonzero only if both sides are aligned.
            unsafe { to_words.add(i).write_volatile(from_words.add(i).read_volatile()) };
        }
        for i in words * 8..len {
            // SAFETY: i < len.
            unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
        }
    }

    /// Sets every byte to zero.
    pub fn clear(&self) {
        let words = self.words(0, self.len);
        for i in 0..words {
            self.write_u64(i * 8, 0);
        }
        for offset in words * 8..self.len {
            self.write_u8(offset, 0);
        }
    }
}

#[cfg(test)]
mod tests;
