//! An address space of the kernel, through either of its interfaces.

use std::fmt;
use std::sync::Arc;

use super::{LiveSpace, Type1Space};
use crate::hardware::AddressSpace;

/// The kernel's interface for mapping memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// iommufd, with character devices.
    Iommufd,
    /// Containers and groups of VFIO, with IOMMU type 1.
    Type1,
}

impl Interface {
    /// One word, as `--iommu` takes it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Iommufd => "iommufd",
            Self::Type1 => "type1",
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The address space of one device.
#[derive(Clone)]
pub enum KernelSpace {
    /// On iommufd.
    Iommufd(LiveSpace),
    /// On a container.
    Type1(Type1Space),
}

impl KernelSpace {
    /// The same space, for those who need not know the interface.
    #[must_use]
    pub fn address_space(&self) -> Arc<dyn AddressSpace> {
        match self {
            Self::Iommufd(space) => Arc::new(space.clone()),
            Self::Type1(space) => Arc::new(space.clone()),
        }
    }
}
