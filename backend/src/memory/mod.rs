//! The guest memory table. For each guest physical range it holds the front-end's virtual address and this process's mapping.
//! A table is immutable and a change makes a new one, so workers share it by `Arc`, without a lock.
//!
//! Regions are validated by [`Region::map`], sorted by guest physical address, and disjoint both in guest physical and in
//! front-end virtual addresses. This module does not depend on the IOMMU.

mod dirty_log;
mod error;
mod file;
mod page;
mod plan;
mod region;
mod shared_file;

use std::fmt;
use std::sync::Arc;

pub use dirty_log::{DirtyLog, LOG_PAGE, LogFault};
pub use error::RegionError;
pub use file::FileId;
pub use page::HostPage;
pub use plan::Plan;
pub use region::{Region, RegionSpec};
pub use shared_file::{SharedFileError, map_shared_file};

use crate::addr::{Address, Gpa, Iova, IovaSlice, Qva, Span};
use crate::sys::SharedMemory;

/// Guest memory regions of one guest, sorted and disjoint.
#[derive(Clone, Default)]
pub struct MemTable {
    regions: Vec<Arc<Region>>,
}

impl MemTable {
    /// Builds a table from regions in any order.
    ///
    /// # Errors
    /// [`RegionError::Overlap`] if two regions overlap in guest physical or front-end virtual addresses.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, RegionError> {
        debug_assert!(regions.windows(2).all(|pair| pair[0].slice() == pair[1].slice()), "one guest has one slice");
        regions.sort_by_key(|region| region.gpa().start());
        for pair in regions.windows(2) {
            if pair[0].gpa().overlaps(&pair[1].gpa()) {
                return Err(RegionError::Overlap { added: pair[0].gpa(), other: pair[1].gpa() });
            }
        }
        let mut by_qva: Vec<_> = regions.iter().collect();
        by_qva.sort_by_key(|region| region.qva().start());
        for pair in by_qva.windows(2) {
            if pair[0].qva().overlaps(&pair[1].qva()) {
                return Err(RegionError::Overlap { added: pair[0].gpa(), other: pair[1].gpa() });
            }
        }
        Ok(Self { regions })
    }

    /// The regions, sorted by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The part of the device's address space that the guest has; `None` without regions.
    #[must_use]
    pub fn slice(&self) -> Option<IovaSlice> {
        self.regions.first().map(|region| region.slice())
    }

    /// True if there are no regions.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The IOVA range of `span`, if all of it is guest memory. `span` may cross from one region into an adjacent one, because
    /// their IOVAs are contiguous.
    ///
    /// `hint` is the index of the last region used, and may be stale. Most buffers of a ring are in one region, so the lookup
    /// usually costs one comparison.
    #[inline]
    #[must_use]
    pub fn iova(&self, span: Span<Gpa>, hint: &mut usize) -> Option<Span<Iova>> {
        if self.regions.get(*hint).is_none_or(|region| !region.gpa().contains(span.start())) {
            *hint = self.find(span.start())?;
        }
        let index = *hint;
        let mut last = self.regions[index].gpa().last();
        for next in &self.regions[index + 1..] {
            if last >= span.last() || last.checked_add(1) != Some(next.gpa().start()) {
                break;
            }
            last = next.gpa().last();
        }
        (span.last() <= last).then(|| self.regions[index].slice().iova(span))
    }

    /// This process's mapping of `span`: the region's memory and the offset in it. `None` unless one region contains all of
    /// `span`.
    #[inline]
    #[must_use]
    pub fn host_memory(&self, span: Span<Gpa>, hint: &mut usize) -> Option<(&SharedMemory, usize)> {
        let to_usize = |offset| usize::try_from(offset).expect("a mapped region fits the address space");
        let look_up = |index: usize| {
            let region = self.regions.get(index)?;
            region.gpa().offset_of_span(&span).map(|offset| (region.memory(), to_usize(offset)))
        };
        if let Some(found) = look_up(*hint) {
            return Some(found);
        }
        *hint = self.find(span.start())?;
        look_up(*hint)
    }

    /// Translates a front-end virtual address range. `None` unless one region contains all of it.
    #[must_use]
    pub fn gpa(&self, start: Qva, len: u64) -> Option<Span<Gpa>> {
        let span = Span::new(start, len)?;
        let region = self.regions.iter().find(|region| region.qva().covers(&span))?;
        region.gpa().slice(region.qva().offset_of(start)?, len)
    }

    /// A copy of this table with one more region.
    ///
    /// # Errors
    /// See [`Self::new`].
    pub fn with(&self, region: Arc<Region>) -> Result<Self, RegionError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// Index of the region that contains `address`.
    fn find(&self, address: Gpa) -> Option<usize> {
        let after = self.regions.partition_point(|region| region.gpa().start() <= address);
        after.checked_sub(1).filter(|&index| self.regions[index].gpa().contains(address))
    }
}

/// The guest physical ranges, for messages: `0x0+2G, 0x100000000+2G`.
impl fmt::Display for MemTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (index, region) in self.regions.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{}", region.gpa())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
