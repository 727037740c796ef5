//! The second address space of the emulated function, for the memory of the virtual machine that comes next.

use std::sync::Arc;

use crate::hardware::{AddressSpace, MapError, SecondSpace};

use super::SoftIommu;
use super::staged_space::StagedSpace;

/// Of a function behind an IOMMU that enforces snooping.
pub(super) struct SoftSecond {
    pub(super) first: SoftIommu,
    pub(super) second: SoftIommu,
}

impl SecondSpace for SoftSecond {
    fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(self.second.clone())
    }

    fn exchange(&self) -> Result<(), MapError> {
        self.first.exchange(&self.second);
        Ok(())
    }
}

/// Of a function that may bypass the caches.
pub(super) struct StagedSecond {
    pub(super) first: StagedSpace,
    pub(super) second: StagedSpace,
}

impl SecondSpace for StagedSecond {
    fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(self.second.clone())
    }

    fn exchange(&self) -> Result<(), MapError> {
        self.first.exchange(&self.second);
        Ok(())
    }
}
