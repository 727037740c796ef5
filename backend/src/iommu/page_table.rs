//! The page table (HWPT) that a device is attached to, and the address space (IOAS) that fills it.
//!
//! It is allocated explicitly (`IOMMU_HWPT_ALLOC`), so it outlives the attachment: mapped pages are pinned before the device is
//! attached and stay pinned after it is detached. The kernel destroys its automatic page table, and unpins the pages, when
//! the device is detached.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Interface;
use crate::sys::{Container, DeviceId, HwInfo, HwptId, Ioas, Iommufd};

/// `ECAP.SC`: the IOMMU can force snooping (VT-d 4.1 §11.4.3).
const ECAP_SC: u64 = 1 << 7;

/// One address space and its page table for one device. Destroyed on drop; the device must be detached by then.
pub struct PageTable {
    iommufd: Arc<Iommufd>,
    /// What [`Self::exchange`] exchanges.
    objects: Mutex<(Ioas, HwptId)>,
    device: DeviceId,
    snoop: Snoop,
}

/// Whether the IOMMU forces the device's DMA to snoop the CPU caches, and the evidence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snoop {
    /// The interface that was asked.
    pub interface: Interface,
    /// The kernel's answer for the page table or container in use (`VFIO_DMA_CC_IOMMU`).
    pub enforced: bool,
    /// What the IOMMU hardware reports (`IOMMU_GET_HW_INFO`, or sysfs), as text. Shown as evidence; nothing depends on it.
    pub hardware: String,
}

impl fmt::Display for Snoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.enforced { "enforced" } else { "not enforced" };
        write!(f, "snooping {word} ({}, VFIO_DMA_CC_IOMMU; {})", self.interface, self.hardware)
    }
}

impl Snoop {
    /// The answer of a container that is enabled. `hardware` as in the field.
    #[must_use]
    pub fn of_container(container: &Container, hardware: String) -> Self {
        Self { interface: Interface::Type1, enforced: container.snoop_enforced(), hardware }
    }
}

impl PageTable {
    /// Allocates a page table for a bound device. Nothing is mapped, and the device is not attached.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub fn new(iommufd: Arc<Iommufd>, ioas: Ioas, device: DeviceId) -> io::Result<Self> {
        let hwpt = iommufd.alloc_hwpt(device, &ioas)?;
        Self::with(iommufd, ioas, device, hwpt)
    }

    /// The page table numbered `hwpt`, which another process has allocated for `ioas` and `device`.
    ///
    /// # Errors
    /// The errno of the call that failed; ENOENT if there is no such page table.
    pub(super) fn existing(iommufd: &Arc<Iommufd>, ioas: &Ioas, device: DeviceId, hwpt: u32) -> io::Result<Self> {
        let hwpt = iommufd.existing_page_table(hwpt)?;
        Self::with(Arc::clone(iommufd), ioas.clone(), device, hwpt)
    }

    fn with(iommufd: Arc<Iommufd>, ioas: Ioas, device: DeviceId, hwpt: HwptId) -> io::Result<Self> {
        let hardware = match iommufd.hw_info(device) {
            Ok(HwInfo::IntelVtd { ecap, .. }) => format!("Intel VT-d, ECAP.SC={}", u8::from(ecap & ECAP_SC != 0)),
            Ok(HwInfo::Other(kind)) => format!("IOMMU hardware type {kind}"),
            Err(error) => format!("IOMMU hardware unknown ({error})"),
        };
        let snoop = Snoop { interface: Interface::Iommufd, enforced: false, hardware };
        let enforced = iommufd.snoop_enforced(&ioas, hwpt)?;
        Ok(Self { iommufd, objects: Mutex::new((ioas, hwpt)), device, snoop: Snoop { enforced, ..snoop } })
    }

    fn objects(&self) -> MutexGuard<'_, (Ioas, HwptId)> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address space that fills it.
    pub(super) fn ioas(&self) -> Ioas {
        self.objects().0.clone()
    }

    /// Exchanges address space and page table with those of `other`, which is of the same device. Whoever has one of the two
    /// destroys the other's from now on.
    pub(super) fn exchange(&self, other: &Self) {
        std::mem::swap(&mut *self.objects(), &mut *other.objects());
    }

    /// The id to attach the device to.
    #[must_use]
    pub fn id(&self) -> HwptId {
        self.objects().1
    }

    /// The device for which it was allocated.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// The iommufd that it belongs to.
    #[must_use]
    pub fn iommufd(&self) -> &Arc<Iommufd> {
        &self.iommufd
    }

    /// See [`Snoop`].
    #[must_use]
    pub fn snoop(&self) -> &Snoop {
        &self.snoop
    }

    /// A second page table for the same device, of `ioas`. The device is never attached to it: what is mapped there is pinned
    /// and unreachable.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub(super) fn for_staging(&self, ioas: &Ioas) -> io::Result<Self> {
        Self::new(Arc::clone(&self.iommufd), ioas.clone(), self.device)
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        if !self.iommufd.ownership().is_ours() {
            return;
        }
        if let Err(error) = self.iommufd.destroy_hwpt(self.id()) {
            log::error!("destroy the page table: {error}; the next one that is allocated tries again");
        }
    }
}
