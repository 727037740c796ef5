//! A bound device whose file another process has handed over.

use std::fs::File;
use std::io;
use std::mem::{self, ManuallyDrop};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_ioctls::{VfioDevice, VfioIommufd};

use super::handle::Handle;
use super::{Cdev, errno};
use crate::sys::Ownership;
use crate::sys::iommufd::{DeviceId, Iommufd};

impl Cdev {
    /// Takes the file of a device that is bound to `iommufd` as its object `id`. The binding belongs to the open file, so it
    /// needs no call.
    ///
    /// # Errors
    /// The errno of the failed step: ENOTTY if it is no VFIO device, EINVAL if it is not bound.
    pub fn handed_over(file: OwnedFd, iommufd: &Iommufd, id: DeviceId) -> io::Result<Self> {
        let context = VfioIommufd::new(Arc::clone(iommufd.inner()), None, None).map_err(errno)?;
        // `vfio-ioctls` allocates an address space for each context that is given none, and destroys it with the device. This
        // device is left alone when it is dropped, so the space would stay. It is destroyed now, and never dropped, because
        // its number can be used again.
        mem::forget(Arc::clone(context.ioas()));
        iommufd.destroy_unused(context.ioas().id())?;
        let device = VfioDevice::new_from_bound_fd(File::from(file), Arc::new(context), false).map_err(errno)?;
        let device = Handle::Cdev(ManuallyDrop::new(device), id);
        Ok(Self { device, ownership: iommufd.ownership().clone() })
    }

    /// Who owns the device.
    #[must_use]
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }
}
