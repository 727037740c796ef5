//! An iommufd that another process has handed over. Its objects are named by numbers, which are checked against the kernel
//! before they are used. No check changes anything.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, IOMMUFD_CMD_IOAS_CHANGE_PROCESS, IOMMUFD_TYPE, iommu_hwpt_set_dirty_tracking,
    iommu_ioas_change_process, iommu_ioas_unmap,
};
use iommufd_ioctls::IommuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_io_nr;

use super::{DeviceId, HwptId, Iommufd, checked, size_u32};
use crate::addr::{Address, Iova, Span};
use crate::sys::device_number::device_number;
use crate::sys::ioas::{Ioas, errno};
use crate::sys::{Owner, Ownership};

ioctl_io_nr!(IOMMU_HWPT_SET_DIRTY_TRACKING, IOMMUFD_TYPE as u32, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING);
ioctl_io_nr!(IOMMU_IOAS_CHANGE_PROCESS, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_CHANGE_PROCESS);

impl DeviceId {
    /// The object's number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl HwptId {
    /// The object's number.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl Iommufd {
    /// An open `/dev/iommu` that was received from another process, which owns its objects until [`Ownership::pass_to`].
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is another file; else the errno of `fstat` or of reading sysfs. Where sysfs is not
    /// mounted, another file shows when its first object is looked up (ENOTTY).
    pub fn handed_over(fd: OwnedFd) -> io::Result<Self> {
        match device_number("/sys/class/misc/iommu/dev") {
            Ok(number) if number == rustix::fs::fstat(&fd)?.st_rdev => {}
            Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not an open /dev/iommu")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (fd, busy) = (Arc::new(IommuFd::new_from_fd(File::from(fd))), Mutex::default());
        Ok(Self { fd, busy, ownership: Ownership::new(Owner::Predecessor) })
    }

    /// Who owns the objects of this iommufd.
    #[must_use]
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// Duplicates the descriptor, for another process.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        // SAFETY: `self.fd` owns the descriptor, which stays open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }.try_clone_to_owned()
    }

    /// The address space numbered `id`.
    ///
    /// # Errors
    /// ENOENT if that is not an address space.
    pub fn existing_ioas(&self, id: u32) -> io::Result<Ioas> {
        let ioas = Ioas::existing(&self.fd, self.ownership.clone(), id);
        self.iova_ranges(&ioas).map(|_| ioas)
    }

    /// The bound device numbered `id`.
    ///
    /// # Errors
    /// ENOENT if that is not a device.
    pub fn existing_device(&self, id: u32) -> io::Result<DeviceId> {
        self.hw_info(DeviceId(id)).map(|_| DeviceId(id))
    }

    /// The page table numbered `id`.
    ///
    /// # Errors
    /// ENOENT if that is not a page table with an address space.
    pub fn existing_page_table(&self, id: u32) -> io::Result<HwptId> {
        let size = size_u32::<iommu_hwpt_set_dirty_tracking>();
        // Turning off a tracking that nobody has turned on changes nothing, and the kernel looks the number up first.
        let off = iommu_hwpt_set_dirty_tracking { size, flags: 0, hwpt_id: id, __reserved: 0 };
        // SAFETY: the kernel reads only the structure, whose size field is correct.
        match checked(unsafe { ioctl_with_ref(&*self.fd, IOMMU_HWPT_SET_DIRTY_TRACKING(), &off) }) {
            Ok(_) => Ok(HwptId(id)),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(HwptId(id)),
            Err(error) => Err(error),
        }
    }

    /// The first of `ranges` that is not mapped in `ioas`, or that the device may not write although it is marked `true`. The
    /// kernel tells by copying the mappings to a space that no device uses, which pins nothing.
    ///
    /// # Errors
    /// The errno of allocating that space.
    pub fn not_mapped(&self, ioas: &Ioas, ranges: &[(Span<Iova>, bool)]) -> io::Result<Option<Span<Iova>>> {
        let scratch = Ioas::allocate(&self.fd, Ownership::new(Owner::ThisProcess))?;
        let absent = |(span, writable): &&(Span<Iova>, bool)| self.copy(ioas, &scratch, *span, *writable).is_err();
        Ok(ranges.iter().find(absent).map(|(span, _)| *span))
    }

    /// Destroys an object that nothing refers to (`IOMMU_DESTROY`).
    pub(in crate::sys) fn destroy_unused(&self, id: u32) -> io::Result<()> {
        self.fd.destroy_iommu_object(id).map_err(errno)
    }

    /// Unmaps each mapping that lies in `window`, and counts the bytes. No mapping may reach over an end of it.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn unmap_window(&self, ioas: &Ioas, window: Span<Iova>) -> io::Result<u64> {
        self.unmap_whole(ioas, window.start().raw(), window.len())
    }

    /// Unmaps everything, and counts the bytes.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn unmap_all(&self, ioas: &Ioas) -> io::Result<u64> {
        self.unmap_whole(ioas, 0, u64::MAX)
    }

    fn unmap_whole(&self, ioas: &Ioas, iova: u64, length: u64) -> io::Result<u64> {
        let mut unmap = iommu_ioas_unmap { size: size_u32::<iommu_ioas_unmap>(), ioas_id: ioas.number(), iova, length };
        match self.fd.unmap_iommu_ioas(&mut unmap).map_err(errno) {
            Ok(()) => Ok(unmap.length),
            // Nothing is mapped there.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Moves the account of all pinned memory to this process (`IOMMU_IOAS_CHANGE_PROCESS`). While the call runs, the memory
    /// counts twice against the limit of this user.
    ///
    /// # Errors
    /// The errno of the call; nothing has changed then. ENOTTY before Linux 6.14, EINVAL if any memory was mapped by its
    /// address, ENOMEM if the limit is too low.
    pub fn change_process(&self) -> io::Result<()> {
        let change = iommu_ioas_change_process { size: size_u32::<iommu_ioas_change_process>(), __reserved: 0 };
        // SAFETY: the kernel reads only the structure, whose size field is correct.
        checked(unsafe { ioctl_with_ref(&*self.fd, IOMMU_IOAS_CHANGE_PROCESS(), &change) }).map(drop)
    }
}
