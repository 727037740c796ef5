//! Neighbouring entries of an array, whose bounds are checked once. The writes that follow cost no comparison.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{SharedArray, Word};

/// `K` neighbouring entries, whose bounds and alignment have been checked.
pub struct SharedRun<'a, W, const N: usize, const K: usize> {
    /// The first word of the first of `K` entries of the array that `'a` borrows.
    base: NonNull<W>,
    _array: PhantomData<&'a W>,
}

impl<O, W: Word, const N: usize> SharedArray<O, W, N> {
    /// The entry at `index` with its neighbours, `K` entries. `None` if the array ends before.
    #[inline]
    #[must_use]
    pub fn run<const K: usize>(&self, index: usize) -> Option<SharedRun<'_, W, N, K>> {
        const { assert!(K > 0) };
        if index.checked_add(K)? > self.count {
            return None;
        }
        Some(SharedRun { base: self.entry(index), _array: PhantomData })
    }
}

impl<W: Word, const N: usize, const K: usize> SharedRun<'_, W, N, K> {
    /// Writes some words of one of the entries, from `first` on, without ordering, each once.
    ///
    /// # Panics
    /// If there is no such entry or no such word. Constants cost no comparison.
    #[inline]
    pub fn write_words<const J: usize>(&self, entry: usize, first: usize, values: [W; J]) {
        assert!(entry < K && first <= N && J <= N - first, "{J} words at {first} of entry {entry} of a run of {K}");
        for (i, value) in values.into_iter().enumerate() {
            #[cfg(test)]
            super::kill::before_store();
            // SAFETY: `base` is the first of `K` entries of an aligned array, which the lifetime borrows and which keeps its
            // mapping. The assertion checks that the word is inside one of them.
            unsafe { self.base.add(entry * N + first + i).write_volatile(value.swap()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::MmapRegion;

    use super::*;
    use crate::sys::SharedMemory;

    fn array(entries: usize) -> SharedArray<SharedMemory, u64, 2> {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(4096).expect("anonymous memory")));
        shared.array(8, entries).expect("inside").into_owned()
    }

    #[test]
    fn a_run_writes_neighbours_alone() {
        let array = array(4);
        let run = array.run::<2>(1).expect("inside");
        run.write_words(0, 1, [3]);
        run.write_words(1, 0, [4, 9]);

        let entries = [0, 1, 2, 3].map(|index| array.read(index));

        assert_eq!(entries, [[0, 0], [0, 3], [4, 9], [0, 0]]);
    }

    #[test]
    fn a_run_past_the_last_entry_is_refused() {
        let array = array(4);

        assert!(array.run::<3>(1).is_some());
        assert!(array.run::<3>(2).is_none());
        assert!(array.run::<1>(4).is_none());
        assert!(array.run::<1>(usize::MAX).is_none());
    }

    #[test]
    #[should_panic(expected = "1 words at 0 of entry 2 of a run of 2")]
    fn an_entry_past_the_run_panics() {
        array(4).run::<2>(1).expect("inside").write_words(2, 0, [0]);
    }

    #[test]
    #[should_panic(expected = "2 words at 1 of entry 0 of a run of 2")]
    fn a_word_past_the_entry_panics() {
        array(4).run::<2>(1).expect("inside").write_words(0, 1, [0, 0]);
    }
}
