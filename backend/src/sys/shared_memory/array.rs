//! An array of equal entries in shared memory: a ring, or a descriptor table. Bounds and alignment are checked on creation,
//! so an access costs one comparison.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SharedMemory;
use crate::sys::barrier;

/// A machine word that a single access reads or writes.
pub trait Word: Copy + sealed::Sealed {
    /// Converts between little-endian, the byte order in shared memory, and that of the CPU.
    #[must_use]
    fn swap(self) -> Self;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! word {
    ($($word:ty),*) => {
        $(
            impl sealed::Sealed for $word {}
            impl Word for $word {
                #[inline]
                fn swap(self) -> Self {
                    self.to_le()
                }
            }
        )*
    };
}
word!(u8, u16, u32, u64);

/// Entries of `N` words of type `W`. `O` keeps the memory mapped: it is a `&SharedMemory` or a [`SharedMemory`].
///
/// An index past the end panics. Callers check indices that the guest or the device has chosen, so a bad one here is a bug in
/// this program.
pub struct SharedArray<O, W, const N: usize> {
    pub(super) base: NonNull<W>,
    pub(super) count: usize,
    owner: O,
}

// SAFETY: as for `SharedMemory`, of which this is a view.
unsafe impl<O: Send, W: Word, const N: usize> Send for SharedArray<O, W, N> {}

impl SharedMemory {
    /// `count` entries at `offset`; `None` if they are not all inside, or not aligned to their words.
    #[inline]
    #[must_use]
    pub fn array<W: Word, const N: usize>(&self, offset: usize, count: usize) -> Option<SharedArray<&Self, W, N>> {
        let bytes = count.checked_mul(size_of::<[W; N]>())?;
        let last = self.len.checked_sub(bytes)?;
        if offset > last {
            return None;
        }
        // SAFETY: offset + bytes <= len, checked above, so the result is inside (or one past) the mapping.
        let base = unsafe { self.base.add(offset) }.cast::<W>();
        base.is_aligned().then_some(SharedArray { base, count, owner: self })
    }
}

impl<W: Word, const N: usize> SharedArray<&SharedMemory, W, N> {
    /// The same array, which now keeps the mapping alive itself.
    #[must_use]
    pub fn into_owned(self) -> SharedArray<SharedMemory, W, N> {
        let Self { base, count, owner } = self;
        SharedArray { base, count, owner: owner.clone() }
    }
}

/// A [`SharedArray`] whose number of entries is a power of two. An index means the entry at its remainder, as a free-running
/// index of a ring does, so an access needs no comparison.
pub struct SharedRing<W, const N: usize> {
    base: NonNull<W>,
    /// One less than the number of entries.
    mask: usize,
    _owner: SharedMemory,
}

// SAFETY: as for `SharedMemory`, of which this is a view.
unsafe impl<W: Word, const N: usize> Send for SharedRing<W, N> {}

impl<W: Word, const N: usize> SharedArray<&SharedMemory, W, N> {
    /// The same entries as a ring, which keeps the mapping alive itself. `None` if their number is not a power of two.
    #[must_use]
    pub fn into_ring(self) -> Option<SharedRing<W, N>> {
        let Self { base, count, owner } = self;
        count.is_power_of_two().then(|| SharedRing { base, mask: count - 1, _owner: owner.clone() })
    }
}

impl<W: Word, const N: usize> SharedRing<W, N> {
    /// Pointer to the first word of the entry at the free-running `index`.
    #[inline]
    fn entry(&self, index: usize) -> NonNull<W> {
        // SAFETY: the remainder is below the number of entries, which `into_ring` found to be a power of two;
        // `SharedMemory::array` checked that all entries are inside, and `_owner` keeps the mapping.
        unsafe { self.base.add((index & self.mask) * N) }
    }

    /// As [`SharedArray::read`].
    #[inline]
    #[must_use]
    pub fn read(&self, index: usize) -> [W; N] {
        // SAFETY: `entry` is inside, and `SharedMemory::array` checked the alignment.
        unsafe { read_entry(self.entry(index)) }
    }

    /// As [`SharedArray::write`].
    #[inline]
    pub fn write(&self, index: usize, words: [W; N]) {
        // SAFETY: as for `read`.
        unsafe { write_entry(self.entry(index), words) }
    }
}

/// Reads the words of an entry without ordering, each once.
///
/// # Safety
/// `entry` is the first of `N` words of shared memory, and aligned.
#[inline(always)]
unsafe fn read_entry<W: Word, const N: usize>(entry: NonNull<W>) -> [W; N] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe { entry.add(i).read_volatile() }.swap())
}

/// Writes the words of an entry without ordering, each once.
///
/// # Safety
/// As for [`read_entry`].
#[inline(always)]
unsafe fn write_entry<W: Word, const N: usize>(entry: NonNull<W>, words: [W; N]) {
    for (i, word) in words.into_iter().enumerate() {
        #[cfg(test)]
        super::kill::before_store();
        // SAFETY: the caller's promise.
        unsafe { entry.add(i).write_volatile(word.swap()) };
    }
}

impl<O, W: Word, const N: usize> SharedArray<O, W, N> {
    /// Pointer to the first word of entry `index`.
    #[inline]
    pub(super) fn entry(&self, index: usize) -> NonNull<W> {
        if index >= self.count {
            outside(index, self.count);
        }
        // SAFETY: index < count, `SharedMemory::array` checked that all entries are inside, and `owner` keeps the mapping.
        unsafe { self.base.add(index * N) }
    }

    /// Reads the entry at `index` as [`Self::read`] does. `None` past the end: for indices that the guest has chosen.
    #[inline]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<[W; N]> {
        if index < self.count { Some(self.read(index)) } else { None }
    }

    /// Reads an entry without ordering, each word once.
    #[inline]
    #[must_use]
    pub fn read(&self, index: usize) -> [W; N] {
        // SAFETY: `entry` checked the bounds, and `SharedMemory::array` the alignment.
        unsafe { read_entry(self.entry(index)) }
    }

    /// Writes an entry without ordering, each word once.
    #[inline]
    pub fn write(&self, index: usize, words: [W; N]) {
        // SAFETY: as for `read`.
        unsafe { write_entry(self.entry(index), words) }
    }
}

impl<O, W: Word, const N: usize> SharedArray<O, W, N> {
    /// Writes one word of an entry without ordering.
    #[inline]
    pub fn write_word(&self, index: usize, word: usize, value: W) {
        self.write_words(index, word, [value]);
    }

    /// Writes some words of an entry, from `first` on, without ordering, each once.
    #[inline]
    pub fn write_words<const K: usize>(&self, index: usize, first: usize, values: [W; K]) {
        if first > N || K > N - first {
            outside(first, N);
        }
        let entry = self.entry(index);
        for (i, value) in values.into_iter().enumerate() {
            #[cfg(test)]
            super::kill::before_store();
            // SAFETY: as for `read`; the words from `first` on are inside the entry.
            unsafe { entry.add(first + i).write_volatile(value.swap()) };
        }
    }

    /// As [`SharedEntry::write_part`].
    #[inline]
    pub fn write_part<P: Word, const AT: usize>(&self, index: usize, value: P) {
        SharedEntry::<_, W, N> { base: self.entry(index), _owner: self }.write_part::<P, AT>(value);
    }
}

/// One entry, whose bounds and alignment have been checked.
pub struct SharedEntry<O, W, const N: usize> {
    pub(super) base: NonNull<W>,
    pub(super) _owner: O,
}

// SAFETY: as for `SharedMemory`, of which this is a view.
unsafe impl<O: Send, W: Word, const N: usize> Send for SharedEntry<O, W, N> {}

impl<W: Word, const N: usize> SharedArray<SharedMemory, W, N> {
    /// The entry at `index`, which keeps the mapping alive itself.
    #[must_use]
    pub fn into_entry(self, index: usize) -> SharedEntry<SharedMemory, W, N> {
        SharedEntry { base: self.entry(index), _owner: self.owner }
    }
}

impl<O, W: Word, const N: usize> SharedEntry<O, W, N> {
    /// Writes one word, or a narrower part of one, that starts `AT` bytes into the entry. Without ordering.
    #[inline]
    pub fn write_part<P: Word, const AT: usize>(&self, value: P) {
        const { assert!(AT.is_multiple_of(size_of::<P>()) && size_of::<P>() <= size_of::<W>() && AT < N * size_of::<W>()) };
        #[cfg(test)]
        super::kill::before_store();
        // SAFETY: `base` is an entry of `_owner`, which keeps the mapping. The assertion checks that the part is inside one of
        // the entry's words and aligned to its size.
        unsafe { self.base.cast::<P>().byte_add(AT).write_volatile(value.swap()) };
    }
}

impl<O> SharedArray<O, u64, 2> {
    /// Reads an entry: the second word first, with acquire ordering. The first word and all later reads of this thread are
    /// then at least as new as the writer's stores before the second word. The writer may be a device.
    #[inline]
    #[must_use]
    pub fn read_acquire(&self, index: usize) -> [u64; 2] {
        let entry = self.entry(index);
        // SAFETY: as for `read`; other writers of this word use atomic or device-sized stores.
        let second = unsafe { AtomicU64::from_ptr(entry.add(1).as_ptr()) }.load(Ordering::Acquire);
        barrier::after_device_load();
        // SAFETY: as for `read`.
        let first = unsafe { entry.read_volatile() };
        [first.swap(), second.swap()]
    }

    /// Writes an entry: the second word last, with release ordering, after the first word and all earlier writes of this
    /// thread.
    #[inline]
    pub fn write_release(&self, index: usize, [first, second]: [u64; 2]) {
        let entry = self.entry(index);
        // SAFETY: as for `read`.
        unsafe { entry.write_volatile(first.swap()) };
        // SAFETY: as for `read_acquire`.
        unsafe { AtomicU64::from_ptr(entry.add(1).as_ptr()) }.store(second.swap(), Ordering::Release);
    }
}

#[cold]
#[inline(never)]
fn outside(index: usize, count: usize) -> ! {
    panic!("entry {index} of {count}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::MmapRegion;

    use super::*;

    fn shared() -> SharedMemory {
        SharedMemory::of(Arc::new(MmapRegion::new(4096).expect("anonymous memory")))
    }

    #[test]
    fn an_entry_is_read_at_its_offset_in_little_endian() {
        let shared = shared();
        shared.copy_from(4 + 8, &[1, 2, 3, 4, 5, 6, 7, 8]);

        let entries = shared.array::<u32, 2>(4, 3).unwrap();

        assert_eq!(entries.read(1), [0x0403_0201, 0x0807_0605]);
    }

    #[test]
    fn a_write_changes_only_its_entry() {
        let shared = shared();
        let entries = shared.array::<u64, 2>(8, 4).unwrap().into_owned();

        entries.write(1, [u64::MAX; 2]);
        entries.write_release(2, [u64::MAX, 7]);

        assert_eq!(entries.read(0), [0; 2]);
        assert_eq!(entries.read(1), [u64::MAX; 2]);
        assert_eq!(entries.read(2), [u64::MAX, 7]);
        assert_eq!(entries.read_acquire(2), [u64::MAX, 7]);
        assert_eq!(entries.read(3), [0; 2]);
    }

    #[test]
    fn a_part_of_an_entry_is_written_alone() {
        let shared = shared();
        let entries = shared.array::<u64, 2>(8, 4).unwrap();

        entries.write_part::<u8, 0>(1, 1);
        entries.write_part::<u16, 2>(1, 0x0302);
        entries.write_part::<u32, 12>(1, 0x0706_0504);

        entries.into_owned().into_entry(3).write_part::<u64, 8>(8);

        let entries = shared.array::<u64, 2>(8, 4).unwrap();
        assert_eq!(entries.read(1), [0x0302_0001, 0x0706_0504_0000_0000]);
        assert_eq!(entries.read(3), [0, 8]);
        assert_eq!((entries.read(0), entries.read(2)), ([0; 2], [0; 2]));
    }

    #[test]
    fn an_index_of_a_ring_means_the_entry_at_its_remainder() {
        let shared = shared();
        let ring = shared.array::<u32, 2>(8, 4).and_then(SharedArray::into_ring).unwrap();

        ring.write(usize::from(u16::MAX), [3, 4]);
        ring.write(4, [1, 2]);

        let entries = shared.array::<u32, 2>(0, 6).unwrap();
        assert_eq!([0, 1, 2, 3, 4, 5].map(|n| entries.read(n)), [[0; 2], [1, 2], [0; 2], [0; 2], [3, 4], [0; 2]]);
        assert_eq!([ring.read(0), ring.read(7)], [[1, 2], [3, 4]]);
    }

    #[test]
    fn only_a_power_of_two_of_entries_is_a_ring() {
        let shared = shared();
        for count in [0, 3, 6] {
            assert!(shared.array::<u16, 1>(0, count).unwrap().into_ring().is_none(), "{count} entries");
        }
    }

    #[test]
    fn an_array_past_the_end_or_misaligned_is_refused() {
        let shared = shared();

        assert!(shared.array::<u64, 2>(0, 256).is_some());
        assert!(shared.array::<u64, 2>(0, 257).is_none());
        assert!(shared.array::<u64, 2>(8, 256).is_none());
        assert!(shared.array::<u64, 2>(4096, 0).is_some());
        assert!(shared.array::<u64, 2>(4104, 0).is_none());
        assert!(shared.array::<u64, 2>(0, usize::MAX).is_none());
        assert!(shared.array::<u64, 2>(4, 1).is_none());
        assert!(shared.array::<u32, 2>(4, 1).is_some());
    }

    #[test]
    #[should_panic(expected = "entry 3 of 3")]
    fn an_entry_past_the_last_panics() {
        let shared = shared();
        let entries = shared.array::<u16, 1>(0, 3).unwrap();

        let _ = entries.read(3);
    }
}
