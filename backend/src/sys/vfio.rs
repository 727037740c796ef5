//! A VFIO device file: a cdev, which `vfio-ioctls` opens, binds and attaches, or one of a group. Configuration space, interrupts
//! and reset use ioctls of this module, because that crate discards their errors.

mod handed_over;
mod handle;
mod whole;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE, vfio_irq_set,
};
use vfio_ioctls::{VfioDevice, VfioError, VfioIommufd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;

use super::ioas::Ioas;
use super::iommufd::{DeviceId, HwptId, Iommufd};
use super::mmio::Mmio;
use super::ownership::{Owner, Ownership};
use super::type1::Group;
use handle::{GroupDevice, Handle};

ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);

/// Most vectors that [`Cdev::route_vectors`] can route.
const MAX_VECTORS: usize = 256;

/// A device file with which the device can be used: a cdev that is bound to an [`Iommufd`], or a file from a [`Group`].
pub struct Cdev {
    device: Handle,
    ownership: Ownership,
}

/// `struct vfio_irq_set` followed by space for the eventfds.
#[repr(C)]
struct IrqSetBuffer {
    header: vfio_irq_set,
    eventfds: [i32; MAX_VECTORS],
}

impl Cdev {
    /// Binds the device whose open character device is `file`. The device is not registered with KVM, which only the virtual
    /// machine's own process can do.
    ///
    /// # Errors
    /// The errno of the failed step: EPERM, EBUSY, EINVAL or ENODEV. The meaning depends on the device's state.
    pub fn bind(file: OwnedFd, iommufd: &Iommufd, ioas: &Ioas) -> io::Result<Self> {
        let context = VfioIommufd::new(Arc::clone(iommufd.inner()), ioas.for_bind(), None).map_err(errno)?;
        let device = VfioDevice::new_from_fd(File::from(file), Arc::new(context), false).map_err(errno)?;
        let id = device.iommufd_dev_id().ok_or_else(|| io::Error::other("bound, but without an iommufd device id"))?;
        let ownership = iommufd.ownership().clone();
        Ok(Self { device: Handle::Cdev(ManuallyDrop::new(device), DeviceId(id)), ownership })
    }

    /// Opens the device `name` of `group`, which has joined a container. When the file is closed, the group leaves it.
    ///
    /// # Errors
    /// The errno of the failed step.
    pub fn of_group(group: Group, name: &CStr) -> io::Result<Self> {
        let file = group.device(name)?;
        let ownership = Ownership::new(Owner::ThisProcess);
        Ok(Self { device: Handle::Group(GroupDevice::new(file, group)?), ownership })
    }

    /// The device's iommufd object ID; `None` for a device of a group.
    #[must_use]
    pub fn id(&self) -> Option<DeviceId> {
        match &self.device {
            Handle::Cdev(_, id) => Some(*id),
            Handle::Group(_) => None,
        }
    }

    /// Attaches the device to `page_table`, so that it can access what is mapped there.
    ///
    /// # Errors
    /// The errno of the call; [`io::ErrorKind::Unsupported`] for a device of a group, which uses its container.
    pub fn attach(&self, page_table: HwptId) -> io::Result<()> {
        match &self.device {
            Handle::Cdev(device, _) => device.attach_hwpt(page_table.0).map_err(errno),
            Handle::Group(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Detaches the device, which blocks all its DMA. The mappings of its page table stay pinned. A device of a group is detached
    /// by closing its file.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn detach(&self) -> io::Result<()> {
        match &self.device {
            Handle::Cdev(device, _) => device.detach_hwpt().map_err(errno),
            Handle::Group(_) => Ok(()),
        }
    }

    /// Size of a region in bytes; 0 if the device has no such region.
    #[must_use]
    pub fn region_size(&self, index: u32) -> u64 {
        self.device.region(index).size
    }

    /// Maps a whole region.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the kernel does not allow the region to be mapped; else the errno of `mmap`.
    pub fn map_region(&self, index: u32) -> io::Result<Mmio> {
        let region = self.device.region(index);
        if region.flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Err(not_mappable(region.size, rustix::param::page_size() as u64));
        }
        let len = usize::try_from(region.size).map_err(io::Error::other)?;
        Mmio::map(self.as_fd(), region.offset, len)
    }

    /// Reads `bytes.len()` bytes of a region at `offset`.
    ///
    /// # Errors
    /// The errno of `pread`; [`io::ErrorKind::UnexpectedEof`] for a short read.
    pub fn read_region(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let position = self.device.offset(index) + offset;
        let wanted = bytes.len();
        let read = rustix::io::pread(self.as_fd(), bytes, position)?;
        if read == wanted { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Writes `bytes` to a region at `offset`.
    ///
    /// # Errors
    /// The errno of `pwrite`; [`io::ErrorKind::WriteZero`] for a short write.
    pub fn write_region(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let position = self.device.offset(index) + offset;
        let written = rustix::io::pwrite(self.as_fd(), bytes, position)?;
        if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Number of vectors of IRQ index `index` (INTx, MSI, MSI-X, ...).
    #[must_use]
    pub fn vectors(&self, index: u32) -> u32 {
        self.device.irq(index).count
    }

    /// Routes vectors 0, 1, ... of IRQ index `index` to `events`. An empty slice disables the interrupt.
    ///
    /// # Errors
    /// The errno of the call; ENOSPC if the host has too few free vectors; [`io::ErrorKind::InvalidInput`] for more than 256
    /// vectors.
    pub fn route_vectors(&self, index: u32, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        if events.len() > MAX_VECTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let data = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
        let count = u32::try_from(events.len()).map_err(io::Error::other)?;
        let header = vfio_irq_set {
            argsz: u32::try_from(size_of::<vfio_irq_set>() + 4 * events.len()).map_err(io::Error::other)?,
            flags: data | VFIO_IRQ_SET_ACTION_TRIGGER,
            index,
            start: 0,
            count,
            ..Default::default()
        };
        let mut set = IrqSetBuffer { header, eventfds: [-1; MAX_VECTORS] };
        for (slot, event) in set.eventfds.iter_mut().zip(events) {
            *slot = event.as_raw_fd();
        }
        // SAFETY: the kernel reads `argsz` bytes, all of them inside `set`.
        irqs_set(unsafe { ioctl_with_ref(&self.device, VFIO_DEVICE_SET_IRQS(), &set) })
    }

    /// Resets the device.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn reset(&self) -> io::Result<()> {
        // SAFETY: the ioctl takes no argument and accesses no memory of this process.
        if unsafe { ioctl(&self.device, VFIO_DEVICE_RESET()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Drop for Cdev {
    fn drop(&mut self) {
        // The other process goes on using the device, which `VfioDevice::drop` would detach. So only the descriptor is closed.
        if let (false, Handle::Cdev(device, _)) = (self.ownership.is_ours(), &self.device) {
            // SAFETY: `device` owns the descriptor, and is neither used nor dropped after this.
            drop(unsafe { OwnedFd::from_raw_fd(device.as_raw_fd()) });
            return;
        }
        // `VfioDevice::drop` panics if it cannot detach, for example after the device was unplugged. Detaching twice is
        // harmless, so if it succeeds here it also succeeds there.
        match (self.detach(), &mut self.device) {
            // SAFETY: `device` is dropped only here, and not used afterwards.
            (Ok(()), Handle::Cdev(device, _)) => unsafe { ManuallyDrop::drop(device) },
            (Ok(()), Handle::Group(_)) => {}
            (Err(error), _) => {
                log::error!("detach the device from its page table: {error}; its file stays open until exit");
            }
        }
    }
}

/// The outcome of `VFIO_DEVICE_SET_IRQS`, which has just returned `result`. A positive number is how many vectors the host could
/// have given; fewer were free than were asked for, and the kernel has given none (`vfio_msi_enable`).
fn irqs_set(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Why a region of `size` bytes cannot be mapped, in pages of `page` bytes. A BAR of NVMe has 16 KiB or so, an arm64 host pages of
/// up to 64 KiB: the rest of the page could belong to another function, so VFIO maps it only if it is free.
fn not_mappable(size: u64, page: u64) -> io::Error {
    if size.is_multiple_of(page) {
        return io::ErrorKind::Unsupported.into();
    }
    let reason = format!(
        "has {}K and shares a page of {}K, which the kernel does not map; start the kernel with \
         pci=resource_alignment=ADDRESS for the function's PCI address, which gives it pages of its own",
        size >> 10,
        page >> 10
    );
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

/// The errno inside an error of `vfio-ioctls`.
fn errno(error: VfioError) -> io::Error {
    use VfioError as E;
    match error {
        E::VfioDeviceBindIommufd(e)
        | E::VfioDeviceAttachIommufdPt(e)
        | E::VfioDeviceDetachIommufdPt(e)
        | E::VfioDeviceGetInfo(e)
        | E::VfioDeviceGetRegionInfo(e) => io::Error::from_raw_os_error(e.errno()),
        E::OpenDeviceCdev(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_that_shares_a_page_of_the_host_is_refused_with_the_kernels_argument() {
        let error = not_mappable(16 << 10, 64 << 10);
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().starts_with("has 16K and shares a page of 64K"), "{error}");
        assert!(error.to_string().contains("pci=resource_alignment="), "{error}");
        // Another reason, which the kernel does not tell.
        assert_eq!(
            not_mappable(16 << 10, 4 << 10).to_string(),
            io::Error::from(io::ErrorKind::Unsupported).to_string()
        );
    }

    #[test]
    fn a_number_of_vectors_in_place_of_success_is_enospc() {
        assert!(irqs_set(0).is_ok());
        for available in [1, 7, i32::MAX] {
            assert_eq!(irqs_set(available).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        }
    }
}
