//! A run of equal entries in shared memory: a ring, or a table of descriptors. Bounds and alignment are checked when it is
//! made, so that an access is one comparison.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::SharedMemory;

/// A machine word that one access moves whole.
pub trait Word: Copy + sealed::Sealed {
    /// From the order of bytes in memory, which is little-endian, to that of the processor, or back.
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
word!(u16, u32, u64);

/// Entries of `N` words of type `W`, in memory that `O` keeps: `&SharedMemory`, or a [`SharedMemory`] of its own.
///
/// An index past the end panics: callers check what the other side has chosen, so a bad one here is a bug in this program.
pub struct SharedArray<O, W, const N: usize> {
    base: NonNull<W>,
    count: usize,
    owner: O,
}

// SAFETY: as for `SharedMemory`, which a `SharedArray` is a view of.
unsafe impl<O: Send, W: Word, const N: usize> Send for SharedArray<O, W, N> {}

impl SharedMemory {
    /// `count` entries from `offset`; `None` when they are not wholly inside, or not aligned to their words.
    #[inline]
    #[must_use]
    pub fn rows<W: Word, const N: usize>(&self, offset: usize, count: usize) -> Option<SharedArray<&Self, W, N>> {
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
    /// The same entries, kept for as long as they are needed.
    #[must_use]
    pub fn keep(self) -> SharedArray<SharedMemory, W, N> {
        let Self { base, count, owner } = self;
        SharedArray { base, count, owner: owner.clone() }
    }
}

impl<O, W: Word, const N: usize> SharedArray<O, W, N> {
    /// The first word of entry `index`.
    #[inline]
    fn row(&self, index: usize) -> NonNull<W> {
        if index >= self.count {
            outside(index, self.count);
        }
        // SAFETY: index < count, and all of them were found inside; the mapping lives as long as `owner`.
        unsafe { self.base.add(index * N) }
    }

    /// Reads an entry, each of its words once and without ordering.
    #[inline]
    #[must_use]
    pub fn read(&self, index: usize) -> [W; N] {
        let row = self.row(index);
        // SAFETY: `row` checked the bounds, `SharedMemory::rows` the alignment.
        std::array::from_fn(|i| unsafe { row.add(i).read_volatile() }.swap())
    }

    /// Writes an entry, each of its words once and without ordering.
    #[inline]
    pub fn write(&self, index: usize, words: [W; N]) {
        let row = self.row(index);
        for (i, word) in words.into_iter().enumerate() {
            // SAFETY: as for `read`.
            unsafe { row.add(i).write_volatile(word.swap()) };
        }
    }
}

impl<O> SharedArray<O, u64, 2> {
    /// Reads an entry, its second word first and with acquire ordering: the first word, and what this thread reads later, is at
    /// least as new as what its writer had written before the second.
    #[inline]
    #[must_use]
    pub fn read_acquire(&self, index: usize) -> [u64; 2] {
        let row = self.row(index);
        // SAFETY: as for `read`; other writers of this word use atomic or device-sized stores.
        let second = unsafe { AtomicU64::from_ptr(row.add(1).as_ptr()) }.load(Ordering::Acquire);
        // SAFETY: as for `read`.
        let first = unsafe { row.read_volatile() };
        [first.swap(), second.swap()]
    }

    /// Writes an entry, its second word last: after the first, and after all earlier writes of this thread.
    #[inline]
    pub fn write_release(&self, index: usize, [first, second]: [u64; 2]) {
        let row = self.row(index);
        // SAFETY: as for `read`.
        unsafe { row.write_volatile(first.swap()) };
        // SAFETY: as for `read_acquire`.
        unsafe { AtomicU64::from_ptr(row.add(1).as_ptr()) }.store(second.swap(), Ordering::Release);
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
    fn an_entry_is_what_lies_at_its_place_in_little_endian() {
        let shared = shared();
        shared.copy_from(4 + 8, &[1, 2, 3, 4, 5, 6, 7, 8]);

        let rows = shared.rows::<u32, 2>(4, 3).unwrap();

        assert_eq!(rows.read(1), [0x0403_0201, 0x0807_0605]);
    }

    #[test]
    fn what_is_written_stays_within_its_entry() {
        let shared = shared();
        let rows = shared.rows::<u64, 2>(8, 4).unwrap().keep();

        rows.write(1, [u64::MAX; 2]);
        rows.write_release(2, [u64::MAX, 7]);

        assert_eq!(rows.read(0), [0; 2]);
        assert_eq!(rows.read(1), [u64::MAX; 2]);
        assert_eq!(rows.read(2), [u64::MAX, 7]);
        assert_eq!(rows.read_acquire(2), [u64::MAX, 7]);
        assert_eq!(rows.read(3), [0; 2]);
    }

    #[test]
    fn entries_that_are_not_wholly_inside_or_not_aligned_are_refused() {
        let shared = shared();

        assert!(shared.rows::<u64, 2>(0, 256).is_some());
        assert!(shared.rows::<u64, 2>(0, 257).is_none());
        assert!(shared.rows::<u64, 2>(8, 256).is_none());
        assert!(shared.rows::<u64, 2>(4096, 0).is_some());
        assert!(shared.rows::<u64, 2>(4104, 0).is_none());
        assert!(shared.rows::<u64, 2>(0, usize::MAX).is_none());
        assert!(shared.rows::<u64, 2>(4, 1).is_none());
        assert!(shared.rows::<u32, 2>(4, 1).is_some());
    }

    #[test]
    #[should_panic(expected = "entry 3 of 3")]
    fn an_entry_past_the_last_panics() {
        let shared = shared();
        let rows = shared.rows::<u16, 1>(0, 3).unwrap();

        let _ = rows.read(3);
    }
}
