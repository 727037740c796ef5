//! Memory of this process for the device: its file, and where it is mapped.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

use super::ledger::Ledger;
use super::mapped_memory::MappedMemory;
use crate::addr::{Iova, LAST_IOVA, Span};
use crate::hardware::MapError;
use crate::sys::SharedMemory;

/// Zeroed memory of at least `bytes`: its file, and a view of whole pages.
pub(super) fn memory(bytes: usize) -> Result<(OwnedFd, SharedMemory), MapError> {
    let failed = |source| MapError::Allocate { bytes, source };
    let len = bytes.checked_next_multiple_of(rustix::param::page_size()).ok_or(MapError::NoIova(bytes))?;
    let file = memfd_create("vhost-device-vfio-dma", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    ftruncate(&file, len as u64).map_err(|e| failed(e.into()))?;
    let same = file.try_clone().map_err(failed)?;
    let mapping = MmapRegion::from_file(FileOffset::new(same.into(), 0), len);
    let mapping = mapping.map_err(|e| failed(io::Error::other(e)))?;
    Ok((file, SharedMemory::of(Arc::new(mapping))))
}

/// The parts of `allowed` where a buffer may be mapped.
pub(super) fn ranges(allowed: &[Span<Iova>]) -> Vec<Span<Iova>> {
    let below = |range: &Span<Iova>| Span::inclusive(range.start(), range.last().min(LAST_IOVA));
    allowed.iter().filter_map(below).collect()
}

/// Where a buffer of `len` bytes can be mapped in all of `spaces`: above guest memory, if there is room.
pub(super) fn gap(spaces: &[&MappedMemory], allowed: &[Span<Iova>], len: u64) -> Option<Span<Iova>> {
    let mut taken = Ledger::default();
    for space in spaces {
        space.ledger().spans().for_each(|span| taken.cover(span));
    }
    taken.highest_gap(&ranges(allowed), len, rustix::param::page_size() as u64)
}
