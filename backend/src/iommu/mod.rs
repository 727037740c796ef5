//! The device's address space: one live IOAS, its page table (HWPT), which only this device uses, and a ledger of what is
//! mapped there.
//!
//! ```text
//! start    allocate the page table ── attach, empty ── map buffers ── bus master on
//! add      allowed? free? ── for each piece: enter in the ledger, map
//! remove   for each piece: unmap, remove from the ledger
//! stop     bus master off, reset ── detach ── unmap buffers ── destroy the page table
//! release  (the host wants the device) as stop, but the mappings stay in the IOAS, unpinned, until the device is back
//! ```
//!
//! That is `LiveSpace`, on iommufd. `type1.rs` is the same on a container of VFIO, without a page table of its own.
//!
//! `sequence.rs` defines map and unmap, with and without flushing. `mapped_memory.rs` walks the pieces and keeps the ledger.
//! A region is mapped in pieces because the kernel cannot split a mapping. A piece has at most 1 GiB, the largest IOMMU page.

mod buffer;
mod flusher;
mod hand_over;
mod hand_over_state;
mod handed_over;
mod kernel_space;
mod ledger;
mod mapped_memory;
mod page_table;
mod sequence;
mod space_description;
mod type1;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::process::{Resource, getrlimit};

pub use flusher::flush;
pub use kernel_space::{Interface, KernelSpace};
pub use mapped_memory::MappedMemory;
pub use page_table::{PageTable, Snoop};
pub use sequence::{Piece, Space, Steps};
pub use space_description::{HandOverError, MappedRange, MappedRegion, SpaceDescription, StagingDescription};
pub use type1::Type1Space;

use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError, SpaceStatistics};
use crate::memory::Region;
use crate::sys::{CacheLines, Cdev, HwptId, Ioas, Iommufd, SharedMemory};
use hand_over_state::HandOver;
use ledger::list;
use mapped_memory::CHUNK;
use sequence::Failed;

/// The address space of one device. Its buffers keep it alive.
#[derive(Clone)]
pub struct LiveSpace(Arc<Live>);

struct Live {
    // Not the page table, which belongs to the device: the device can be released and reacquired.
    iommufd: Arc<Iommufd>,
    ioas: Ioas,
    /// `Some` if the device's DMA may bypass the CPU caches.
    staging: Option<Staging>,
    mapped: MappedMemory,
    /// While the device is released: the ranges it allowed. The kernel allows any range then.
    released_ranges: Mutex<Option<Vec<Span<Iova>>>>,
    hand_over: HandOver,
}

/// What flushing needs.
struct Staging {
    lines: CacheLines,
    ioas: Ioas,
    device: Mutex<Device>,
    /// All mapped memory, which is flushed when the device is released or reacquired. The lock is held across each map and
    /// unmap, so neither runs during that flush.
    flushable: Mutex<BTreeMap<Iova, (Span<Iova>, SharedMemory)>>,
}

/// The device to which the live page table is attached.
struct Device {
    /// Its file. Once it is closed, the device does no DMA.
    file: Weak<Cdev>,
    hwpt: HwptId,
    /// The staging page table, which is never attached. `None` while the device is released: nothing is pinned then.
    staging_table: Option<PageTable>,
}

impl Staging {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flushable(&self) -> MutexGuard<'_, BTreeMap<Iova, (Span<Iova>, SharedMemory)>> {
        self.flushable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush_all(&self, flushable: &BTreeMap<Iova, (Span<Iova>, SharedMemory)>) {
        for (_, shared) in flushable.values() {
            flush(&self.lines, shared, 0, shared.len());
        }
    }
}

impl LiveSpace {
    /// For a device whose DMA is coherent.
    #[must_use]
    pub fn coherent(table: &PageTable) -> Self {
        Self::with(table, None)
    }

    fn with(table: &PageTable, staging: Option<Staging>) -> Self {
        let (iommufd, ioas) = (Arc::clone(table.iommufd()), table.ioas.clone());
        let mapped = MappedMemory::new(staging.is_some(), CHUNK);
        let hand_over = HandOver::default();
        hand_over.attached_to(Some((table.device(), table.id())));
        Self(Arc::new(Live { iommufd, ioas, staging, mapped, released_ranges: Mutex::default(), hand_over }))
    }

    /// For `device`, whose DMA may bypass the CPU caches. Memory is flushed with `lines` before the device can reach it, and
    /// after it no longer can.
    ///
    /// # Errors
    /// The errno of allocating the staging page table.
    pub fn flushing(table: &PageTable, lines: CacheLines, device: Weak<Cdev>) -> io::Result<Self> {
        let ioas = table.iommufd().alloc_ioas()?;
        let device = Device { file: device, hwpt: table.id(), staging_table: Some(table.for_staging(&ioas)?) };
        let staging = Staging { lines, ioas, device: Mutex::new(device), flushable: Mutex::default() };
        Ok(Self::with(table, Some(staging)))
    }

    /// Where to allocate the page table of a reacquired device: a page table of this IOAS maps, and pins, what is mapped here.
    #[must_use]
    pub fn iommufd_and_ioas(&self) -> (Arc<Iommufd>, Ioas) {
        (Arc::clone(&self.0.iommufd), self.0.ioas.clone())
    }

    /// Takes a reacquired device, which is attached to `table` and does no DMA yet.
    ///
    /// # Errors
    /// The errno of allocating another staging page table, or that memory cannot be flushed.
    pub fn rejoin(&self, table: &PageTable, device: Weak<Cdev>) -> io::Result<()> {
        if let Some(staging) = &self.0.staging {
            let flushable = staging.flushable();
            let staging_table = Some(table.for_staging(&staging.ioas)?);
            *staging.device() = Device { file: device, hwpt: table.id(), staging_table };
            staging.flush_all(&flushable);
            if flushable.values().any(|(_, shared)| shared.lost_pages() != 0) {
                staging.device().staging_table = None;
                return Err(io::Error::other("the front-end has truncated its memory, so it cannot be flushed"));
            }
        }
        self.0.hand_over.attached_to(Some((table.device(), table.id())));
        *self.0.released_ranges() = None;
        Ok(())
    }

    /// The order of the steps by which memory is mapped, as text.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.0.mapped.order()
    }
}

impl Steps for Live {
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()> {
        if let Some((file, offset)) = piece.file {
            match self.iommufd.map_file(self.ioas(space), file, offset, piece.span, piece.writable) {
                // Linux before 6.13 has no IOMMU_IOAS_MAP_FILE.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
                other => return other,
            }
        }
        let Piece { span, shared, offset, writable, .. } = piece;
        self.iommufd.map_memory(self.ioas(space), (shared, offset), span, writable)
    }

    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()> {
        self.iommufd.copy(self.ioas(from), self.ioas(to), piece.span, piece.writable)
    }

    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()> {
        self.iommufd.unmap(self.ioas(space), span)
    }

    fn flush(&self, piece: Piece<'_>) {
        let staging = self.staging.as_ref().expect("only a flushing regime flushes");
        flush(&staging.lines, piece.shared, piece.offset, piece.bytes());
    }

    fn detach(&self) -> io::Result<()> {
        let device = self.staging.as_ref().and_then(|staging| staging.device().file.upgrade());
        device.map_or(Ok(()), |device| device.detach())
    }

    fn attach(&self) -> io::Result<()> {
        let Some(staging) = &self.staging else { return Ok(()) };
        let device = staging.device();
        device.file.upgrade().map_or(Ok(()), |file| file.attach(device.hwpt))
    }
}

impl Live {
    fn ioas(&self, space: Space) -> &Ioas {
        match (space, &self.staging) {
            (Space::Staging, Some(staging)) => &staging.ioas,
            _ => &self.ioas,
        }
    }

    fn released_ranges(&self) -> MutexGuard<'_, Option<Vec<Span<Iova>>>> {
        self.released_ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `whole`, and records it if it must be flushed later.
    fn add_mapping(&self, whole: Piece<'_>) -> Result<(), MapError> {
        let mut flushable = self.staging.as_ref().map(Staging::flushable);
        let whose = "all processes of this user";
        self.mapped.add(self, whole).map_err(|(span, failed)| explain(&self.mapped, whose, span, failed))?;
        if let Some(flushable) = &mut flushable {
            flushable.insert(whole.span.start(), (whole.span, whole.shared.clone()));
        }
        Ok(())
    }

    /// Runs `unmap`, which unmaps `whole`, and deletes the record.
    fn remove_mapping(&self, whole: Piece<'_>, unmap: impl FnOnce() -> Result<(), MapError>) -> Result<(), MapError> {
        let mut flushable = self.staging.as_ref().map(Staging::flushable);
        unmap()?;
        if let Some(flushable) = &mut flushable {
            flushable.remove(&whole.span.start());
        }
        Ok(())
    }

    /// Unmaps `region` by `unmap`, unless another process keeps it mapped.
    fn remove_region(
        &self,
        region: &Region,
        unmap: impl FnOnce(&Self, Piece<'_>) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        if self.keeps_mapped(region) {
            return Ok(());
        }
        let whole = whole(region);
        self.remove_mapping(whole, || unmap(self, whole))?;
        self.hand_over.unmapped(whole.span);
        Ok(())
    }

    /// The ranges that this address space allows now. Queried each time, because attaching a device narrows them.
    fn allowed(&self, about: Span<Iova>) -> Result<Vec<Span<Iova>>, MapError> {
        if let Some(ranges) = &*self.released_ranges() {
            return Ok(ranges.clone());
        }
        let kernel = |source| MapError::Kernel { step: "IOMMU_IOAS_IOVA_RANGES for", span: about, source };
        self.iommufd.iova_ranges(&self.ioas).map_err(kernel)
    }
}

/// Turns ENOMEM into an error that names RLIMIT_MEMLOCK, if that limit is the cause. `whose` memory the kernel counts.
fn explain(mapped: &MappedMemory, whose: &'static str, span: Span<Iova>, (step, source): Failed) -> MapError {
    let limit = getrlimit(Resource::Memlock).current;
    let needed = mapped.statistics().mapped.saturating_add(span.len());
    match limit {
        Some(limit) if source.raw_os_error() == Some(libc::ENOMEM) && needed > limit => {
            MapError::MemLock { span, needed_kib: needed / 1024, allowed_kib: limit / 1024, whose }
        }
        _ => MapError::Kernel { step, span, source },
    }
}

/// All of a region.
fn whole(region: &Region) -> Piece<'_> {
    let file = region.pinnable().then(|| (region.file().as_fd(), region.offset()));
    Piece { span: region.iova(), shared: region.memory(), offset: 0, file, writable: region.writable() }
}

impl AddressSpace for LiveSpace {
    fn allowed(&self) -> Result<Vec<Span<Iova>>, MapError> {
        self.0.allowed(Span::new(Iova(0), u64::MAX).expect("not empty"))
    }

    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let live = &*self.0;
        if live.adopt(region)? {
            return Ok(());
        }
        let whole = whole(region);
        check_free(&live.mapped, &live.allowed(whole.span)?, whole.span)?;
        live.add_mapping(whole)?;
        live.hand_over.mapped(region);
        Ok(())
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.0.remove_region(region, |live, whole| live.mapped.remove(live, whole))
    }

    fn remove_while_idle(&self, region: &Region) -> Result<(), MapError> {
        self.0.remove_region(region, |live, whole| live.mapped.remove_while_idle(live, whole))
    }

    fn require_flush_before_map(&self) {
        self.0.mapped.require_flush_before_map();
    }

    fn release(&self) {
        let ranges = self.0.iommufd.iova_ranges(&self.0.ioas).unwrap_or_else(|error| {
            log::error!("IOMMU_IOAS_IOVA_RANGES: {error}; no memory can be mapped while the device is released");
            Vec::new()
        });
        *self.0.released_ranges() = Some(ranges);
        self.0.hand_over.attached_to(None);
        if let Some(staging) = &self.0.staging {
            let flushable = staging.flushable();
            staging.flush_all(&flushable);
            staging.device().staging_table = None;
        }
    }

    fn is_released(&self) -> bool {
        self.0.released_ranges().is_some()
    }

    fn statistics(&self) -> SpaceStatistics {
        self.0.mapped.statistics()
    }

    fn pins(&self) -> bool {
        true
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        Some(Arc::new(self.0.staging.as_ref()?.lines))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let live = &*self.0;
        let (file, shared) = buffer::memory(bytes)?;
        let len = shared.len() as u64;
        let zero = Span::new(Iova(0), len).ok_or(MapError::NoIova(bytes))?;
        let allowed = live.room_for_buffers(live.allowed(zero)?, zero)?;
        let span = buffer::gap(&live.mapped, &allowed, len).ok_or(MapError::NoIova(bytes))?;
        let whole = Piece { span, shared: &shared, offset: 0, file: Some((file.as_fd(), 0)), writable: true };
        live.add_mapping(whole)?;
        let mapping = BufferMapping { space: Arc::clone(&self.0), span, shared: shared.clone() };
        Ok(DmaBuffer::new(shared, span, Box::new(mapping)))
    }
}

/// A buffer's mapping, unmapped on drop. The device no longer uses the buffer then.
struct BufferMapping {
    space: Arc<Live>,
    span: Span<Iova>,
    shared: SharedMemory,
}

impl Drop for BufferMapping {
    fn drop(&mut self) {
        let live = &*self.space;
        if !live.unmaps_buffers() {
            return;
        }
        let whole = Piece { span: self.span, shared: &self.shared, offset: 0, file: None, writable: true };
        let removed = live.remove_mapping(whole, || match live.mapped.remove(live, whole) {
            // The driver frees its memory only when nothing is in flight.
            Err(MapError::DeviceMustBeIdle { .. }) => live.mapped.remove_while_idle(live, whole),
            other => other,
        });
        if let Err(error) = removed {
            log::error!("{error}");
        }
    }
}

/// Fails unless `span` is inside one of `allowed`, and nothing is mapped there.
fn check_free(mapped: &MappedMemory, allowed: &[Span<Iova>], span: Span<Iova>) -> Result<(), MapError> {
    if !allowed.iter().any(|range| range.covers(&span)) {
        return Err(MapError::NotAllowed { span, allowed: list(allowed) });
    }
    let taken = mapped.ledger().conflict(span);
    taken.map_or(Ok(()), |taken| Err(MapError::Overlap { span, taken }))
}
