//! The address space of a function that goes behind the caches: memory is flushed before the function can reach it, so
//! that it finds what CPUs wrote, and after it no longer can, so that CPUs find what it wrote.

use std::sync::Arc;

use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError};
use crate::memory::Region;

use super::SoftIommu;

pub(super) struct FlushedSpace {
    pub(super) iommu: SoftIommu,
    pub(super) cache: Arc<dyn CacheFlush>,
}

impl AddressSpace for FlushedSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.cache.flush(region.window(), 0, region.window().len());
        self.iommu.add(region)
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.iommu.remove(region)?;
        self.cache.flush(region.window(), 0, region.window().len());
        Ok(())
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        Some(Arc::clone(&self.cache))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        // Reachable for a moment already, but nobody has told the function where.
        let buffer = self.iommu.buffer(bytes)?;
        self.cache.flush(buffer.window(), 0, buffer.window().len());
        Ok(buffer)
    }
}
