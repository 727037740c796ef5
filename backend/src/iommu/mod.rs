//! The device's address space: one live IOAS, its page table (HWPT), which only this device uses, and a ledger of what is
//! mapped there.
//!
//! ```text
//! start    allocate the page table ── attach, empty ── map buffers ── bus master on
//! add      allowed? free? ── for each piece: enter in the ledger, map
//! remove   for each piece: unmap, remove from the ledger
//! stop     bus master off, reset ── detach ── unmap buffers ── destroy the page table
//! release  (the host wants the device) as stop, but the mappings stay in the IOAS, unpinned, until the device is back
//! exchange the device is attached to the page table of another IOAS, see `second.rs`
//! ```
//!
//! That is `LiveSpace`, on iommufd. `type1.rs` is the same on a container of VFIO, without a page table of its own.
//!
//! `sequence.rs` defines map and unmap, with and without flushing. `mapped_memory.rs` walks the pieces and keeps the ledger.
//! A region is mapped in pieces because the kernel cannot split a mapping. A piece has at most 1 GiB, the largest IOMMU page.

mod borrowed;
mod buffer;
mod flusher;
mod hand_over;
mod hand_over_state;
mod handed_over;
mod kernel_space;
mod ledger;
mod mapped_memory;
mod page_table;
mod second;
mod sequence;
mod space_description;
mod staging;
mod type1;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
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
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError, SecondSpace, SpaceStatistics};
use crate::memory::Region;
use crate::sys::{CacheLines, Cdev, Ioas, Iommufd, SharedMemory};
use hand_over_state::HandOver;
use ledger::list;
use mapped_memory::CHUNK;
use second::Twin;
use sequence::Failed;
use staging::Staging;

/// The address space of one device. Its buffers keep it alive.
#[derive(Clone)]
pub struct LiveSpace(Arc<Live>);

struct Live {
    // Not the page table, which belongs to the device: the device can be released and reacquired.
    iommufd: Arc<Iommufd>,
    /// The live IOAS. [`SecondSpace`] exchanges it.
    ioas: Mutex<Ioas>,
    attachment: Mutex<Attachment>,
    /// `Some` if the device's DMA may bypass the CPU caches.
    staging: Option<Staging>,
    mapped: MappedMemory,
    /// While the device is released: the ranges it allowed. The kernel allows any range then.
    released_ranges: Mutex<Option<Vec<Span<Iova>>>>,
    hand_over: HandOver,
    twin: Twin,
    /// Some memory was mapped by this process's address, because the kernel does not map its file.
    maps_by_address: AtomicBool,
}

/// The device, and the page table that it is attached to. Both are gone while it is released.
#[derive(Clone, Default)]
struct Attachment {
    /// Its file. Once it is closed, the device does no DMA.
    file: Weak<Cdev>,
    table: Weak<PageTable>,
}

impl LiveSpace {
    /// For `device`, whose DMA is coherent. It is attached to `table`.
    #[must_use]
    pub fn coherent(table: &Arc<PageTable>, device: Weak<Cdev>) -> Self {
        Self::with(table, device, None)
    }

    fn with(table: &Arc<PageTable>, file: Weak<Cdev>, staging: Option<Staging>) -> Self {
        let mapped = MappedMemory::new(staging.is_some(), CHUNK);
        let attachment = Attachment { file, table: Arc::downgrade(table) };
        let hand_over = HandOver::default();
        hand_over.attached_to(Some((table.device(), table.id())));
        Self(Arc::new(Live::new(table, attachment, (staging, mapped), hand_over, Twin::default())))
    }

    /// For `device`, whose DMA may bypass the CPU caches. Memory is flushed with `lines` before the device can reach it, and
    /// after it no longer can.
    ///
    /// # Errors
    /// The errno of allocating the staging page table.
    pub fn flushing(table: &Arc<PageTable>, lines: CacheLines, device: Weak<Cdev>) -> io::Result<Self> {
        let staging = Staging::for_device_of(table, lines)?;
        Ok(Self::with(table, device, Some(staging)))
    }

    /// Where to allocate the page table of a reacquired device: a page table of this IOAS maps, and pins, what is mapped here.
    #[must_use]
    pub fn iommufd_and_ioas(&self) -> (Arc<Iommufd>, Ioas) {
        (Arc::clone(&self.0.iommufd), self.0.ioas(Space::Live))
    }

    /// Takes a reacquired device, which is attached to `table` and does no DMA yet.
    ///
    /// # Errors
    /// The errno of allocating another staging page table, or that memory cannot be flushed.
    pub fn rejoin(&self, table: &Arc<PageTable>, device: Weak<Cdev>) -> io::Result<()> {
        self.0.staging.as_ref().map_or(Ok(()), |staging| staging.rejoin(table))?;
        *self.0.attachment() = Attachment { file: device, table: Arc::downgrade(table) };
        self.0.hand_over.attached_to(Some((table.device(), table.id())));
        *self.0.released_ranges() = None;
        self.0.rejoin_second(table.device());
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
            match self.iommufd.map_file(&self.ioas(space), file, offset, piece.span, piece.writable) {
                // Linux before 6.13 has no IOMMU_IOAS_MAP_FILE.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {}
                other => return other,
            }
        }
        let Piece { span, shared, offset, writable, .. } = piece;
        self.maps_by_address.store(true, Relaxed);
        self.iommufd.map_memory(&self.ioas(space), (shared, offset), span, writable)
    }

    fn copy(&self, from: Space, to: Space, piece: Piece<'_>) -> io::Result<()> {
        self.iommufd.copy(&self.ioas(from), &self.ioas(to), piece.span, piece.writable)
    }

    fn unmap(&self, space: Space, span: Span<Iova>) -> io::Result<()> {
        self.iommufd.unmap(&self.ioas(space), span)
    }

    fn flush(&self, piece: Piece<'_>) {
        let staging = self.staging.as_ref().expect("only a flushing regime flushes");
        flush(&staging.lines, piece.shared, piece.offset, piece.bytes());
    }

    fn detach(&self) -> io::Result<()> {
        let device = self.attachment().file.upgrade();
        device.map_or(Ok(()), |device| device.detach())
    }

    fn attach(&self) -> io::Result<()> {
        let Attachment { file, table } = self.attachment().clone();
        let attached = file.upgrade().zip(table.upgrade());
        attached.map_or(Ok(()), |(file, table)| file.attach(table.id()))
    }
}

impl Live {
    fn new(
        table: &PageTable,
        attachment: Attachment,
        (staging, mapped): (Option<Staging>, MappedMemory),
        hand_over: HandOver,
        twin: Twin,
    ) -> Self {
        let (iommufd, ioas) = (Arc::clone(table.iommufd()), Mutex::new(table.ioas()));
        let (attachment, released_ranges) = (Mutex::new(attachment), Mutex::default());
        let maps_by_address = AtomicBool::new(false);
        Self { iommufd, ioas, attachment, staging, mapped, released_ranges, hand_over, twin, maps_by_address }
    }

    fn ioas(&self, space: Space) -> Ioas {
        match (space, &self.staging) {
            (Space::Staging, Some(staging)) => staging.ioas.clone(),
            _ => self.ioas.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    fn attachment(&self) -> MutexGuard<'_, Attachment> {
        self.attachment.lock().unwrap_or_else(PoisonError::into_inner)
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
        if self.keeps_mapped(region) || self.give_back(region) {
            return Ok(());
        }
        self.lend_no_more(region);
        let whole = whole(region);
        self.remove_mapping(whole, || unmap(self, whole))?;
        self.hand_over.unmapped(whole.span);
        Ok(())
    }

    /// The ranges that this address space allows now. Queried each time, because attaching a device narrows them.
    fn allowed(&self, about: Span<Iova>) -> Result<Vec<Span<Iova>>, MapError> {
        if let Some(first) = self.twin.first() {
            return first.allowed(about);
        }
        if let Some(ranges) = &*self.released_ranges() {
            return Ok(ranges.clone());
        }
        let kernel = |source| MapError::Kernel { step: "IOMMU_IOAS_IOVA_RANGES for", span: about, source };
        self.iommufd.iova_ranges(&self.ioas(Space::Live)).map_err(kernel)
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
        if !live.borrow_region(region) {
            live.add_mapping(whole)?;
        }
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
        let ranges = self.0.iommufd.iova_ranges(&self.0.ioas(Space::Live)).unwrap_or_else(|error| {
            log::error!("IOMMU_IOAS_IOVA_RANGES: {error}; no memory can be mapped while the device is released");
            Vec::new()
        });
        *self.0.released_ranges() = Some(ranges);
        self.0.hand_over.attached_to(None);
        *self.0.attachment() = Attachment::default();
        self.0.staging.iter().for_each(Staging::release);
        self.0.release_second();
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

    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        self.allocate_second()
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let live = &*self.0;
        let second = live.twin.second();
        let (file, shared) = buffer::memory(bytes)?;
        let len = shared.len() as u64;
        let zero = Span::new(Iova(0), len).ok_or(MapError::NoIova(bytes))?;
        let allowed = live.room_for_buffers(live.allowed(zero)?, zero)?;
        let spaces: Vec<_> = [Some(live), second.get()].into_iter().flatten().map(|live| &live.mapped).collect();
        let span = buffer::gap(&spaces, &allowed, len).ok_or(MapError::NoIova(bytes))?;
        let whole = Piece { span, shared: &shared, offset: 0, file: Some((file.as_fd(), 0)), writable: true };
        live.add_mapping(whole)?;
        second.share_buffer(live, whole)?;
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
        live.twin.second().forget_buffer(self.span);
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
