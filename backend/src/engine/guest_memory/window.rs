//! The regions of guest memory, as they are looked up by address.

use crate::addr::{Address, Gpa};
use crate::memory::Region;
use crate::sys::{SharedArray, SharedMemory};

/// A region: its start, and exactly its memory. So one check of the bounds covers both sides.
pub(super) struct Window {
    start: Gpa,
    pub(super) memory: SharedMemory,
}

impl Window {
    pub(super) fn new(region: &Region) -> Self {
        let len = usize::try_from(region.gpa().len()).expect("a mapped region fits the address space");
        let memory = region.memory().slice(0, len).expect("a region is mapped as a whole");
        Self { start: region.gpa().start(), memory }
    }

    /// The `pairs` of 64-bit words at `address`, if they are all inside and aligned.
    #[inline(always)]
    pub(super) fn words(&self, address: Gpa, pairs: usize) -> Option<SharedArray<&SharedMemory, u64, 2>> {
        self.memory.array(self.offset_of(address)?, pairs)
    }

    /// The offset of `address`: past the end if the address is not inside.
    #[inline(always)]
    fn offset_of(&self, address: Gpa) -> Option<usize> {
        // An address before the start wraps to an offset past the end.
        usize::try_from(address.raw().wrapping_sub(self.start.raw())).ok()
    }

    /// The offset of `len` bytes at `address`, if they are all inside.
    #[inline]
    pub(super) fn offset(&self, address: Gpa, len: usize) -> Option<usize> {
        let offset = self.offset_of(address)?;
        self.memory.contains(offset, len).then_some(offset)
    }
}

/// The memory of `len` bytes at `address`, and the offset in it. `None` unless one window contains them all. `hint` is the
/// index of the window used last, and may be stale.
#[inline]
pub(super) fn find<'w>(
    windows: &'w [Window],
    address: Gpa,
    len: usize,
    hint: &mut usize,
) -> Option<(&'w SharedMemory, usize)> {
    if let Some(window) = windows.get(*hint)
        && let Some(offset) = window.offset(address, len)
    {
        return Some((&window.memory, offset));
    }
    let window = search(windows, address, hint)?;
    window.offset(address, len).map(|offset| (&window.memory, offset))
}

/// The only window that can contain `address`. Its index is the next hint.
#[inline]
fn search<'w>(windows: &'w [Window], address: Gpa, hint: &mut usize) -> Option<&'w Window> {
    *hint = windows.partition_point(|window| window.start <= address).checked_sub(1)?;
    Some(&windows[*hint])
}

/// The window that contains the `len` bytes at `address`. Its index is the next hint.
#[cold]
pub(super) fn window_of<'w>(windows: &'w [Window], address: Gpa, len: usize, hint: &mut usize) -> Option<&'w Window> {
    search(windows, address, hint).filter(|window| window.offset(address, len).is_some())
}

/// The window with the `entries` descriptors at `address`, see [`Window::words`]. Its index is the next hint.
#[cold]
pub(super) fn window_of_words<'w>(
    windows: &'w [Window],
    address: Gpa,
    entries: usize,
    hint: &mut usize,
) -> Option<&'w Window> {
    search(windows, address, hint).filter(|window| window.words(address, entries).is_some())
}
