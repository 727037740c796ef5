//! The virtual machine's memory as the device reaches it: one region for each DMA map, at the IOVA that the virtual machine
//! monitor requests. Without a virtual IOMMU that is the guest physical address.
//!
//! Not everything in a guest's address space can be mapped: ROMs, and memory of other devices, come without a file. Such maps
//! are accepted and recorded, because QEMU expects them to succeed as with kernel VFIO, but not mapped: DMA there faults in
//! the IOMMU.
//!
//! An unmap names a range, and removes each map that lies in it, as kernel VFIO does: behind a virtual IOMMU, QEMU unmaps a
//! range without knowing what is mapped there. It changes nothing if a map lies in the range only in part.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::addr::{Address, Gpa, Qva, Span};
use crate::hardware::{AddressSpace, MapError};
use crate::memory::{FileId, HostPage, Region, RegionSpec};

use super::PassthroughError;
use super::logs::Logs;

/// A map that takes longer is logged: half of the time that QEMU waits for a reply by default (`x-msg-timeout`).
const SLOW: Duration = Duration::from_millis(2500);

/// `VFIO_USER_DMA_MAP`.
pub(crate) struct DmaMap {
    /// IOVA.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Offset in `file`, in bytes.
    pub(crate) offset: u64,
    /// The device may write it.
    pub(crate) writable: bool,
    /// The memory, if it is shared.
    pub(crate) file: Option<File>,
}

enum Mapped {
    Region(Arc<Region>),
    /// Recorded only: the device cannot reach it.
    Unreachable(Span<Gpa>),
}

impl Mapped {
    fn span(&self) -> Span<Gpa> {
        match self {
            Self::Region(region) => region.gpa(),
            Self::Unreachable(span) => *span,
        }
    }
}

/// See the top of this file.
pub(crate) struct DmaMaps<'d> {
    space: &'d dyn AddressSpace,
    logs: &'d Logs,
    maps: BTreeMap<u64, Mapped>,
    unreachable_logged: bool,
}

impl<'d> DmaMaps<'d> {
    pub(super) fn new(space: &'d dyn AddressSpace, logs: &'d Logs) -> Self {
        Self { space, logs, maps: BTreeMap::new(), unreachable_logged: false }
    }

    /// The number of maps, unreachable ones included.
    pub(crate) fn len(&self) -> usize {
        self.maps.len()
    }

    /// Maps memory for the device. When this returns the device may use it; on error nothing is mapped.
    pub(crate) fn map(&mut self, map: DmaMap) -> Result<Span<Gpa>, PassthroughError> {
        let span = page_span(map.address, map.size, HostPage::of_system())?;
        if let Some(mapped) = self.conflict(span) {
            return Err(PassthroughError::Exists { requested: span, mapped });
        }
        let mapped = match map.file {
            Some(file) => Mapped::Region(self.map_region(span, map.offset, map.writable, file)?),
            // Address 0 is guest RAM, which must be shared. Memory of devices lies elsewhere.
            None if map.writable && map.address == 0 => return Err(PassthroughError::NotShared(span)),
            None => self.unreachable(span),
        };
        self.maps.insert(map.address, mapped);
        Ok(span)
    }

    fn map_region(
        &self,
        gpa: Span<Gpa>,
        offset: u64,
        writable: bool,
        file: File,
    ) -> Result<Arc<Region>, PassthroughError> {
        let start = Instant::now();
        // vfio-user has no front-end virtual addresses. A region needs a unique one, and the GPA is unique.
        let qva = Qva(gpa.start().raw());
        let mut spec = RegionSpec { gpa, qva, offset, file: Arc::new(file) };
        spec.share_file(self.regions())?;
        let region = Arc::new(Region::map_piece(spec, writable)?);
        self.space.add(&region)?;
        let took = start.elapsed();
        let kib = self.space.statistics().mapped / 1024;
        let access = if writable { "" } else { " read-only" };
        self.logs.maps.info(|| format!("DMA map {gpa}{access} in {} ms; {kib} KiB in all", took.as_millis()));
        if took >= SLOW {
            self.logs.problems.warn(|| {
                format!(
                    "DMA map {gpa} took {} ms; QEMU gives up after x-msg-timeout (5000 ms by default): use huge pages or \
                     prealloc=on on its memory backend to make this faster, or a larger x-msg-timeout",
                    took.as_millis()
                )
            });
        }
        Ok(region)
    }

    /// True if something of this file is mapped.
    pub(crate) fn has_file(&self, id: FileId) -> bool {
        self.regions().any(|region| region.id() == id)
    }

    fn regions(&self) -> impl Iterator<Item = &Arc<Region>> {
        self.maps.values().filter_map(|mapped| match mapped {
            Mapped::Region(region) => Some(region),
            Mapped::Unreachable(_) => None,
        })
    }

    fn unreachable(&mut self, span: Span<Gpa>) -> Mapped {
        if !std::mem::replace(&mut self.unreachable_logged, true) {
            self.logs.grants.info(|| {
                format!(
                    "DMA map {span} comes without a file: a ROM or another device's memory. The device cannot reach it; \
                     DMA there faults in the IOMMU. Further maps without a file are not logged"
                )
            });
        }
        Mapped::Unreachable(span)
    }

    /// Removes every map in the range, in ascending order. If one cannot be removed, it and those after it stay.
    pub(crate) fn unmap(&mut self, address: u64, size: u64) -> Result<(), PassthroughError> {
        let not_mapped = PassthroughError::NotMapped { address, size };
        let Some(range) = Span::new(Gpa::from_raw(address), size) else { return Err(not_mapped) };
        let found = self.overlapping(range);
        if let Some(mapped) = found.iter().find(|mapped| !range.covers(mapped)) {
            return Err(PassthroughError::Cut { range, mapped: *mapped });
        }
        if found.is_empty() { Err(not_mapped) } else { self.unmap_each(&found) }
    }

    /// Removes all maps, as [`Self::unmap`].
    pub(crate) fn unmap_everything(&mut self) -> Result<(), PassthroughError> {
        let all: Vec<_> = self.maps.values().map(Mapped::span).collect();
        self.unmap_each(&all)
    }

    fn unmap_each(&mut self, spans: &[Span<Gpa>]) -> Result<(), PassthroughError> {
        for (done, span) in spans.iter().enumerate() {
            self.unmap_one(*span).map_err(|source| PassthroughError::StaysMapped {
                span: *span,
                after: spans.len() - done - 1,
                source,
            })?;
        }
        Ok(())
    }

    /// Removes the map of exactly `span`, which exists.
    fn unmap_one(&mut self, span: Span<Gpa>) -> Result<(), MapError> {
        let address = span.start().raw();
        if let Some(Mapped::Region(region)) = self.maps.get(&address) {
            self.space.remove(region)?;
            self.logs.maps.info(|| format!("DMA unmap {span}; {} KiB left", self.space.statistics().mapped / 1024));
        }
        self.maps.remove(&address);
        Ok(())
    }

    /// Removes all maps; errors are only logged. The device must do no DMA any more.
    pub(crate) fn unmap_all(&mut self) {
        for mapped in std::mem::take(&mut self.maps).into_values() {
            let Mapped::Region(region) = mapped else { continue };
            let removed = match self.space.remove(&region) {
                // Bus master is off, so the device is idle.
                Err(MapError::DeviceMustBeIdle { .. }) => self.space.remove_while_idle(&region),
                other => other,
            };
            if let Err(error) = removed {
                self.logs.problems.error(|| format!("DMA unmap {}: {error}; it stays mapped", region.gpa()));
            }
        }
    }

    /// The map that overlaps `span`, if any.
    fn conflict(&self, span: Span<Gpa>) -> Option<Span<Gpa>> {
        let before = self.maps.range(..=span.last().raw()).next_back().map(|(_, mapped)| mapped.span());
        before.filter(|mapped| mapped.overlaps(&span))
    }

    /// All maps that overlap `span`, in ascending order.
    fn overlapping(&self, span: Span<Gpa>) -> Vec<Span<Gpa>> {
        let descending = self.maps.range(..=span.last().raw()).rev().map(|(_, mapped)| mapped.span());
        let mut found: Vec<_> = descending.take_while(|mapped| mapped.overlaps(&span)).collect();
        found.reverse();
        found
    }
}

/// The range of a map, which must be whole pages.
fn page_span(address: u64, size: u64, page: HostPage) -> Result<Span<Gpa>, PassthroughError> {
    let whole = address.is_multiple_of(page.bytes()) && size.is_multiple_of(page.bytes());
    let span = Span::new(Gpa::from_raw(address), size).filter(|_| whole);
    span.ok_or(PassthroughError::Range { address, size, page })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_cuts_a_page_of_the_host_is_refused_with_the_size_of_the_page() {
        for (page, address, size, fits) in [
            (4096, 0x1000, 0x3000, true),
            (16384, 0x4000, 0x4000, true),
            (16384, 0x1000, 0x4000, false),
            (65536, 0x1_0000, 0x2_0000, true),
            (65536, 0x1_0000, 0x1000, false),
        ] {
            let span = page_span(address, size, HostPage::of(page));

            assert_eq!(span.as_ref().ok().copied(), Span::new(Gpa(address), size).filter(|_| fits));
            if let Err(error) = span {
                assert!(error.to_string().contains(&format!("whole pages of {}K", page >> 10)), "{error}");
            }
        }
    }
}
