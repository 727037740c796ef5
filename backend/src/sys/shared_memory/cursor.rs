//! An array with a current entry, whose bounds are checked when it is selected. The writes that follow cost no comparison.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{SharedArray, SharedEntry, SharedMemory, Word};

/// A [`SharedArray`] with a current entry.
pub struct SharedCursor<W, const N: usize> {
    array: SharedArray<SharedMemory, W, N>,
    /// The first word of an entry of `array`. Only [`Self::select`] and [`Self::select_run`] change it, after their check.
    current: NonNull<W>,
}

// SAFETY: as for `SharedMemory`, of which this is a view.
unsafe impl<W: Word, const N: usize> Send for SharedCursor<W, N> {}

impl<W: Word, const N: usize> SharedArray<SharedMemory, W, N> {
    /// The same array. The current entry is the first.
    ///
    /// # Panics
    /// If there is no entry.
    #[must_use]
    pub fn into_cursor(self) -> SharedCursor<W, N> {
        SharedCursor { current: self.entry(0), array: self }
    }
}

impl<W: Word, const N: usize> SharedCursor<W, N> {
    /// The array.
    #[inline]
    #[must_use]
    pub fn array(&self) -> &SharedArray<SharedMemory, W, N> {
        &self.array
    }

    /// Makes the entry at `index` the current one.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn select(&mut self, index: usize) {
        self.current = self.array.entry(index);
    }

    /// Makes the entry at `index` the current one and returns it with its neighbours, `K` entries. `None` if the array ends before;
    /// the current entry is then the former one.
    #[inline]
    #[must_use]
    pub fn select_run<const K: usize>(&mut self, index: usize) -> Option<SharedRun<'_, W, N, K>> {
        const { assert!(K > 0) };
        if index.checked_add(K)? > self.array.count {
            return None;
        }
        self.current = self.array.entry(index);
        Some(SharedRun { base: self.current, _cursor: PhantomData })
    }

    /// The current entry.
    #[inline]
    #[must_use]
    pub fn current(&self) -> SharedEntry<&Self, W, N> {
        SharedEntry { base: self.current, _owner: self }
    }
}

/// `K` neighbouring entries, whose bounds and alignment have been checked.
pub struct SharedRun<'a, W, const N: usize, const K: usize> {
    /// The first word of the first of `K` entries of the array that `'a` borrows.
    base: NonNull<W>,
    _cursor: PhantomData<&'a W>,
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

    fn cursor(entries: usize) -> SharedCursor<u64, 2> {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(4096).expect("anonymous memory")));
        shared.array(8, entries).expect("inside").into_owned().into_cursor()
    }

    #[test]
    fn a_write_changes_the_current_entry_alone() {
        let mut cursor = cursor(4);
        cursor.current().write_part::<u64, 8>(7);
        cursor.select(2);
        cursor.current().write_part::<u8, 0>(1);

        let entries = [0, 1, 2, 3].map(|index| cursor.array().read(index));

        assert_eq!(entries, [[0, 7], [0, 0], [1, 0], [0, 0]]);
    }

    #[test]
    fn a_run_writes_neighbours_and_starts_at_the_current_entry() {
        let mut cursor = cursor(4);
        let run = cursor.select_run::<2>(1).expect("inside");
        run.write_words(0, 1, [3]);
        run.write_words(1, 0, [4, 9]);
        cursor.current().write_part::<u64, 0>(5);

        let entries = [0, 1, 2, 3].map(|index| cursor.array().read(index));

        assert_eq!(entries, [[0, 0], [5, 3], [4, 9], [0, 0]]);
    }

    #[test]
    fn a_run_past_the_last_entry_is_refused_and_nothing_is_selected() {
        let mut cursor = cursor(4);

        assert!(cursor.select_run::<3>(1).is_some());
        assert!(cursor.select_run::<3>(2).is_none());
        assert!(cursor.select_run::<1>(4).is_none());
        assert!(cursor.select_run::<1>(usize::MAX).is_none());
        cursor.current().write_part::<u64, 0>(6);

        assert_eq!(cursor.array().read(1), [6, 0]);
    }

    #[test]
    #[should_panic(expected = "entry 4 of 4")]
    fn an_entry_past_the_last_is_not_selected() {
        cursor(4).select(4);
    }

    #[test]
    #[should_panic(expected = "1 words at 0 of entry 2 of a run of 2")]
    fn an_entry_past_the_run_panics() {
        cursor(4).select_run::<2>(1).expect("inside").write_words(2, 0, [0]);
    }

    #[test]
    #[should_panic(expected = "2 words at 1 of entry 0 of a run of 2")]
    fn a_word_past_the_entry_panics() {
        cursor(4).select_run::<2>(1).expect("inside").write_words(0, 1, [0, 0]);
    }
}
