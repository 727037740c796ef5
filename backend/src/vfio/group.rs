//! A function through its group and a container: the interface of kernels without iommufd. There is nothing to attach to: a group
//! that joins a container has all its mappings, so bus master is turned off before anything is mapped.

use std::ffi::CString;
use std::io;
use std::path::PathBuf;

use super::{Attached, DeviceFile, FunctionName, Opened, VfioError};
use crate::sys::{Cdev, Container, Group};

impl Opened {
    /// Opens `/dev/vfio/vfio`, and checks that there is IOMMU type 1 and that the function's group can be accessed.
    ///
    /// # Errors
    /// What is missing, and how to fix it.
    pub fn open_container(&self) -> Result<Container, VfioError> {
        let file = DeviceFile::Container.open(self.address).map_err(VfioError::no_container)?;
        let container = Container::new(file).map_err(VfioError::no_container)?;
        if !container.has_type1() {
            return Err(VfioError::no_container(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
        }
        let path = self.group_file()?;
        self.check_group(&path).map_err(|source| VfioError::group(self.address, path, source))?;
        Ok(container)
    }

    fn group_file(&self) -> Result<PathBuf, VfioError> {
        self.address.group_file().ok_or(VfioError::NoIommu(self.address))
    }

    /// Puts the function's group into `container`, which is empty, and opens the function. Bus master is off afterwards, so it
    /// does no DMA yet.
    ///
    /// # Errors
    /// Why it cannot be used, such as the process that uses its group.
    pub fn attach_by_group(self, container: &Container) -> Result<Attached, VfioError> {
        let address = self.address;
        let name = FunctionName::from(address);
        let error = |step| move |source| VfioError::Kernel { name, step, source };
        let path = self.group_file()?;
        let file = DeviceFile::Group.open(address).map_err(|source| VfioError::group(address, path, source))?;
        let group = Group::new(file);
        if !group.is_viable().map_err(error("check its group (VFIO_GROUP_GET_STATUS)"))? {
            return Err(VfioError::not_viable(address, io::Error::from_raw_os_error(libc::EPERM)));
        }
        group.join(container).map_err(error("put its group into a container (VFIO_GROUP_SET_CONTAINER)"))?;
        container.enable().map_err(|source| VfioError::enable(address, source))?;
        let text = CString::new(address.to_string()).expect("a PCI address has no zero byte");
        let cdev = Cdev::of_group(group, &text).map_err(error("open it (VFIO_GROUP_GET_DEVICE_FD)"))?;
        Attached::new(name, None, cdev)
    }
}
