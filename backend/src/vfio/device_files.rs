//! Opens the files of a function. A process that can open nothing itself has them opened by another one, which it names once.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{Opened, PciAddress, VfioError};

/// A file of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFile {
    /// Its character device.
    Cdev,
    /// The file of its IOMMU group.
    Group,
    /// `/dev/vfio/vfio`, a new container.
    Container,
}

/// Opens a file of the function at an address.
pub type OpenFn = dyn Fn(PciAddress, DeviceFile) -> io::Result<OwnedFd> + Send + Sync;

static OPENER: OnceLock<Box<OpenFn>> = OnceLock::new();

/// From now on `open` opens all files of functions. Only the first call has an effect.
pub fn open_by(open: Box<OpenFn>) {
    // A second opener would be for the same process.
    let _ = OPENER.set(open);
}

impl DeviceFile {
    /// Its path; `None` if sysfs names none.
    fn path(self, address: PciAddress) -> Option<PathBuf> {
        match self {
            Self::Cdev => address.cdev(),
            Self::Group => address.group_file(),
            Self::Container => Some(PathBuf::from("/dev/vfio/vfio")),
        }
    }

    /// Opens it by its path, in this process.
    ///
    /// # Errors
    /// The errno of `open`; ENOENT if sysfs names no path.
    pub fn open_by_path(self, address: PciAddress) -> io::Result<OwnedFd> {
        let path = self.path(address).ok_or(io::ErrorKind::NotFound)?;
        Ok(File::options().read(true).write(true).open(path)?.into())
    }

    /// Opens it, by way of [`open_by`] if that was called.
    ///
    /// # Errors
    /// The errno of `open`; ENOENT if there is no such file.
    pub fn open(self, address: PciAddress) -> io::Result<OwnedFd> {
        OPENER.get().map_or_else(|| self.open_by_path(address), |open| open(address, self))
    }
}

impl Opened {
    /// Opens its character device.
    ///
    /// # Errors
    /// [`VfioError::NoCdev`], [`VfioError::NotPassedIn`], [`VfioError::NotAllowed`] or [`VfioError::NoAccess`].
    pub(super) fn open_cdev(&self) -> Result<OwnedFd, VfioError> {
        let path = self.address.cdev().ok_or(VfioError::NoCdev(self.address))?;
        DeviceFile::Cdev.open(self.address).map_err(|source| VfioError::node(path, "vfio-dev", source))
    }

    /// Checks the access to its character device.
    ///
    /// # Errors
    /// As for [`Self::open_cdev`].
    pub(super) fn check_cdev(&self) -> Result<(), VfioError> {
        // Only `open` asks the control group. It does not claim the device.
        self.open_cdev().map(drop)
    }

    /// Checks the access to the file of its group, without opening it: only one process can have it open. Who opens it by way of
    /// another process finds out by doing so.
    pub(super) fn check_group(&self, path: &Path) -> io::Result<()> {
        if OPENER.get().is_some() {
            return Ok(());
        }
        Ok(rustix::fs::access(path, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK)?)
    }
}
