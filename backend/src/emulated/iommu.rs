//! A software IOMMU, which translates all DMA of the function. DMA to an unmapped address faults: the fault is recorded and no
//! data is transferred.
//!
//! A transfer holds the read side of a lock, and unmapping takes the write side. When an unmap returns, no transfer to its
//! range is running or can start, as after an IOTLB invalidation. Lock order: submission queue, completion queue, IOMMU.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use vm_memory::MmapRegion;

use crate::addr::{Address, Iova, Span};
use crate::hardware::{AddressSpace, DmaBuffer, MapError, SecondSpace, SpaceStatistics};
use crate::memory::Region;
use crate::sys::SharedMemory;

use super::cache::Cache;
use super::dma::Dma;
use super::lock;
use super::mapping::{DmaFault, FaultLog, Mapping};
use super::second::SoftSecond;

/// IOMMU page size in bytes. All mappings are multiples of it.
const PAGE: u64 = 4096;

struct Inner {
    allowed: Vec<Span<Iova>>,
    /// Sorted by start, disjoint.
    mappings: RwLock<Vec<Mapping>>,
    faults: Mutex<FaultLog>,
    maps: AtomicU64,
    /// The cache model, if snooping is not enforced.
    cache: Option<Arc<Cache>>,
    /// True if the function marks its transactions No Snoop.
    no_snoop: AtomicBool,
    /// True if the function is detached: all its DMA faults.
    detached: AtomicBool,
    /// The driver's buffers, and the second address space, which has them as well. The lock is held while either changes.
    shared: Mutex<Shared>,
}

/// What this address space and the second one share.
#[derive(Default)]
struct Shared {
    buffers: Vec<(Span<Iova>, SharedMemory)>,
    second: Weak<Inner>,
}

/// A handle to the IOMMU. Clones refer to the same IOMMU.
#[derive(Clone)]
pub struct SoftIommu {
    inner: Arc<Inner>,
}

impl SoftIommu {
    /// An empty address space of `1 << width` bytes (12 to 57 bits), except the `reserved` ranges. It enforces snooping.
    #[must_use]
    pub fn new(width: u8, reserved: &[Span<Iova>]) -> Self {
        Self::with_cache(None, width, reserved)
    }

    /// Like [`Self::new`], but No Snoop transactions bypass `cache`, if given.
    pub(super) fn with_cache(cache: Option<Arc<Cache>>, width: u8, reserved: &[Span<Iova>]) -> Self {
        let last = (1 << width.clamp(12, 57)) - 1;
        let mut reserved = reserved.to_vec();
        reserved.sort_by_key(Span::start);
        let mut allowed = Vec::new();
        let mut next = Some(0);
        for hole in reserved {
            let Some(start) = next else { break };
            if let Some(before) = hole.start().raw().checked_sub(1) {
                allowed.extend(Span::inclusive(Iova(start), Iova(before.min(last))));
            }
            next = hole.last().raw().checked_add(1).map(|after| after.max(start));
        }
        if let Some(start) = next {
            allowed.extend(Span::inclusive(Iova(start), Iova(last)));
        }
        Self::of(allowed, cache)
    }

    fn of(allowed: Vec<Span<Iova>>, cache: Option<Arc<Cache>>) -> Self {
        Self {
            inner: Arc::new(Inner {
                allowed,
                mappings: RwLock::default(),
                faults: Mutex::default(),
                maps: AtomicU64::new(0),
                cache,
                no_snoop: AtomicBool::new(false),
                detached: AtomicBool::new(false),
                shared: Mutex::default(),
            }),
        }
    }

    /// Another address space of the same function, which does not use it. It has no buffers.
    pub(super) fn another(&self) -> Self {
        Self::of(self.inner.allowed.clone(), self.inner.cache.clone())
    }

    /// Exchanges all mappings with those of `other`. No transfer runs meanwhile.
    pub(super) fn exchange(&self, other: &Self) {
        let mut mine = self.inner.mappings.write().unwrap_or_else(PoisonError::into_inner);
        let mut others = other.inner.mappings.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut *mine, &mut *others);
    }

    /// Maps `shared` at `span`.
    ///
    /// # Errors
    /// [`MapError::NotAllowed`] and [`MapError::Overlap`].
    ///
    /// # Panics
    /// If the two differ in length, or `span` is not a multiple of 4096-byte pages.
    pub fn map(&self, span: Span<Iova>, shared: SharedMemory) -> Result<(), MapError> {
        self.map_as(span, shared, true)
    }

    /// Like [`Self::map`]; unless `writable`, a write of the function faults.
    pub(super) fn map_as(&self, span: Span<Iova>, shared: SharedMemory, writable: bool) -> Result<(), MapError> {
        assert_eq!(shared.len() as u64, span.len(), "memory and span have the same length");
        assert!(span.start().is_aligned(PAGE) && span.len().is_multiple_of(PAGE), "{span} is not made of whole pages");
        self.check_allowed(span)?;
        let mut mappings = self.inner.mappings.write().unwrap_or_else(PoisonError::into_inner);
        check_free(&mappings, span)?;
        let index = mappings.partition_point(|mapping| mapping.span.start() < span.start());
        mappings.insert(index, Mapping { span, shared, writable });
        self.inner.maps.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Checks whether `span` can be mapped.
    ///
    /// # Errors
    /// [`MapError::NotAllowed`] and [`MapError::Overlap`].
    pub(super) fn check(&self, span: Span<Iova>) -> Result<(), MapError> {
        self.check_allowed(span)?;
        check_free(&self.dma().mappings, span)
    }

    fn check_allowed(&self, span: Span<Iova>) -> Result<(), MapError> {
        let allowed = &self.inner.allowed;
        if allowed.iter().any(|allowed| allowed.covers(&span)) {
            return Ok(());
        }
        let allowed: Vec<_> = allowed.iter().map(|span| format!("{}-{}", span.start(), span.last())).collect();
        Err(MapError::NotAllowed { span, allowed: allowed.join(", ") })
    }

    /// Removes the mapping that is exactly `span`.
    ///
    /// # Errors
    /// [`MapError::NotMapped`].
    pub fn unmap(&self, span: Span<Iova>) -> Result<(), MapError> {
        let mut mappings = self.inner.mappings.write().unwrap_or_else(PoisonError::into_inner);
        let index = mappings.iter().position(|mapping| mapping.span == span).ok_or(MapError::NotMapped { span })?;
        mappings.remove(index);
        Ok(())
    }

    /// Number of successful map calls so far.
    #[must_use]
    pub fn maps(&self) -> u64 {
        self.inner.maps.load(Relaxed)
    }

    /// The current mappings, in ascending order.
    #[must_use]
    pub fn mapped(&self) -> Vec<Span<Iova>> {
        self.dma().mappings.iter().map(|mapping| mapping.span).collect()
    }

    /// The most recent faults, oldest first; at most 1024 are kept.
    #[must_use]
    pub fn faults(&self) -> Vec<DmaFault> {
        lock(&self.inner.faults).kept.iter().copied().collect()
    }

    /// Total number of DMA faults.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        lock(&self.inner.faults).total
    }

    /// The highest span of `len` bytes that is free here and not among `taken`. The length must be a multiple of the page size.
    pub(super) fn free_span(&self, len: u64, taken: &[Span<Iova>]) -> Option<Span<Iova>> {
        let taken = [&self.mapped()[..], taken].concat();
        for allowed in self.inner.allowed.iter().rev() {
            let mut last = allowed.last();
            loop {
                let start = last.raw().checked_sub(len - 1)? & !(PAGE - 1);
                let candidate = Span::new(Iova(start), len)?;
                if !allowed.covers(&candidate) {
                    break;
                }
                let Some(taken) = taken.iter().rev().find(|span| span.overlaps(&candidate)) else {
                    return Some(candidate);
                };
                let Some(below) = taken.start().raw().checked_sub(1) else { break };
                last = Iova(below);
            }
        }
        None
    }

    /// A DMA read by the function outside of any command.
    ///
    /// # Errors
    /// The fault, which is recorded.
    pub fn read(&self, at: Iova, bytes: &mut [u8]) -> Result<(), DmaFault> {
        self.dma().read(at, bytes, &mut 0)
    }

    /// A DMA write by the function outside of any command.
    ///
    /// # Errors
    /// The fault, which is recorded.
    pub fn write(&self, at: Iova, bytes: &[u8]) -> Result<(), DmaFault> {
        self.dma().write(at, bytes, &mut 0)
    }

    /// Starts a series of transfers. Mapping and unmapping wait until it is dropped.
    pub(super) fn dma(&self) -> Dma<'_> {
        let mappings = self.inner.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let cache = self.inner.cache.as_deref().filter(|_| self.inner.no_snoop.load(SeqCst));
        let detached = self.inner.detached.load(SeqCst);
        Dma { mappings, faults: &self.inner.faults, cache, detached }
    }

    /// Detaches the function, so that all its DMA faults, or attaches it again. On return, no transfer that started earlier is
    /// running.
    pub(super) fn set_detached(&self, detached: bool) {
        let _no_transfers = self.inner.mappings.write().unwrap_or_else(PoisonError::into_inner);
        self.inner.detached.store(detached, SeqCst);
    }

    /// Sets whether the function marks its transactions No Snoop. Running transfers are not affected.
    pub(super) fn set_no_snoop(&self, on: bool) {
        self.inner.no_snoop.store(on, SeqCst);
    }
}

fn check_free(mappings: &[Mapping], span: Span<Iova>) -> Result<(), MapError> {
    let next = mappings.partition_point(|mapping| mapping.span.last() < span.start());
    match mappings.get(next) {
        Some(taken) if taken.span.overlaps(&span) => Err(MapError::Overlap { span, taken: taken.span }),
        _ => Ok(()),
    }
}

impl AddressSpace for SoftIommu {
    fn allowed(&self) -> Result<Vec<Span<Iova>>, MapError> {
        Ok(self.inner.allowed.clone())
    }

    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.map_as(region.iova(), region.memory().clone(), region.writable())
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.unmap(region.iova())
    }

    fn statistics(&self) -> SpaceStatistics {
        let mapped = self.mapped().iter().map(Span::len).sum();
        SpaceStatistics { maps: self.maps(), mapped, ..SpaceStatistics::default() }
    }

    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        let mut shared = lock(&self.inner.shared);
        if shared.second.strong_count() != 0 {
            return Err(MapError::NoSecondSpace { why: "there is one already".into() });
        }
        let second = self.another();
        for (span, memory) in &shared.buffers {
            second.map(*span, memory.clone())?;
        }
        shared.second = Arc::downgrade(&second.inner);
        Ok(Arc::new(SoftSecond { first: self.clone(), second }))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let mut state = lock(&self.inner.shared);
        let second = state.second.upgrade().map(|inner| Self { inner });
        let len = (bytes.max(1) as u64).checked_next_multiple_of(PAGE).ok_or(MapError::NoIova(bytes))?;
        let size = usize::try_from(len).map_err(|_| MapError::NoIova(bytes))?;
        let memory =
            MmapRegion::new(size).map_err(|error| MapError::Allocate { bytes, source: io::Error::other(error) })?;
        let shared = SharedMemory::of(Arc::new(memory));
        // Another thread may map the same span between the search and the map. Then search again.
        loop {
            let taken = second.as_ref().map(Self::mapped).unwrap_or_default();
            let span = self.free_span(len, &taken).ok_or(MapError::NoIova(bytes))?;
            match self.map(span, shared.clone()) {
                Err(MapError::Overlap { .. }) => {}
                other => {
                    other?;
                    second.iter().try_for_each(|second| second.map(span, shared.clone()))?;
                    state.buffers.push((span, shared.clone()));
                    return Ok(DmaBuffer::new(shared, span, Box::new(Unmap { iommu: self.clone(), span })));
                }
            }
        }
    }
}

/// Removes the mapping when the driver's buffer is dropped.
struct Unmap {
    iommu: SoftIommu,
    span: Span<Iova>,
}

impl Drop for Unmap {
    fn drop(&mut self) {
        let mut shared = lock(&self.iommu.inner.shared);
        shared.buffers.retain(|(span, _)| *span != self.span);
        if let Some(inner) = shared.second.upgrade() {
            SoftIommu { inner }.unmap(self.span).expect("mapped in both");
        }
        self.iommu.unmap(self.span).expect("only this value unmaps the driver's buffer");
    }
}
