//! Where a VFIO function comes from: from a path, or from files that were opened elsewhere and passed to
//! this process, by number on the command line or by name by the service manager. With all of these it needs no path in /dev or /sys,
//! and no right to open one.

use std::cell::RefCell;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use vhost_device_vfio::acquire::AcquiredFunction;
use vhost_device_vfio::config::{Config, DeviceArg};
use vhost_device_vfio::kvm::SecondFile;
use vhost_device_vfio::service_manager::Passed;
use vhost_device_vfio::sys::{Iommufd, inherit};
use vhost_device_vfio::vfio::{DeviceFile, FunctionName, InterfaceChoice, PassedIn, PciAddress, open_iommufd};

/// The passed-in files of the device and the IOMMU. Each is used once.
#[derive(Default)]
pub(crate) struct PassedFiles {
    device: RefCell<Option<PassedIn>>,
    iommufd: RefCell<Option<Iommufd>>,
    second: Option<Arc<OwnedFd>>,
}

/// Nobody can open it a second time.
const NO_SECOND_FILE: &str =
    "the device was passed in, and no second file of it named kvm (OpenFile=/dev/vfio/devices/vfioN:kvm)";
const NO_DEVICE: &str = "--device fd: no descriptor with the name device was passed; give --device fd=FDNUM, or the service \
                         OpenFile=/dev/vfio/devices/vfioN:device";
const NO_IOMMUFD: &str =
    "no open /dev/iommu was passed in (--iommu-fd, or OpenFile=/dev/iommu:iommu), and it cannot be opened";
/// It was used before.
const ONCE: &str = "the passed-in device has been closed; start this program again with a new one";

impl PassedFiles {
    /// Takes what `config` names by number, and else what the service manager has passed by name.
    ///
    /// # Errors
    /// What is not open, or is no such file.
    pub(crate) fn take(config: &Config, passed: Option<&Passed>) -> Result<Self> {
        let take = |number: Option<RawFd>, name: &str, option: &str| match number {
            Some(number) => inherit(number).map(Some).with_context(|| format!("{option} {number}")),
            None => passed
                .and_then(|passed| passed.named(name))
                .map(|number| inherit(number).with_context(|| format!("the descriptor named {name}")))
                .transpose(),
        };
        let device = match config.device {
            Some(DeviceArg::PassedIn(number)) => {
                let file = take(number, "device", "--device fd")?.context(NO_DEVICE)?;
                Some(PassedIn::new(file)?)
            }
            _ => None,
        };
        let iommufd = take(config.iommu_fd, "iommu", "--iommu-fd")?.map(Iommufd::passed_in);
        let second = take(None, "kvm", "")?.map(Arc::new);
        Ok(Self { device: RefCell::new(device), iommufd: RefCell::new(iommufd), second })
    }
}

/// A VFIO function: at an address, or passed in.
pub(crate) struct VfioSource {
    address: Option<PciAddress>,
    files: PassedFiles,
    choice: InterfaceChoice,
}

impl VfioSource {
    /// The function at `address`; without one, the one that `files` contain.
    pub(crate) fn new(address: Option<PciAddress>, files: PassedFiles, choice: InterfaceChoice) -> Self {
        Self { address, files, choice }
    }

    /// Acquires it, with the passed-in iommufd if there is one.
    ///
    /// # Errors
    /// What is missing, or why it cannot be acquired.
    pub(crate) fn acquire(&self) -> Result<AcquiredFunction> {
        let iommufd = self.files.iommufd.take();
        if self.choice == InterfaceChoice::Type1 && (iommufd.is_some() || self.address.is_none()) {
            bail!("--iommu=type1: a passed-in device or iommufd is not used through type1; leave that argument out");
        }
        let Some(address) = self.address else {
            let device = self.files.device.take().context(ONCE)?;
            let iommufd = iommufd.map_or_else(|| open_iommufd(Path::new("/dev/iommu")).context(NO_IOMMUFD), Ok)?;
            return Ok(AcquiredFunction::acquire_passed_in(device, iommufd)?);
        };
        Ok(match iommufd {
            Some(iommufd) => AcquiredFunction::acquire_by(address, iommufd)?,
            None => AcquiredFunction::acquire(address, self.choice)?,
        })
    }

    /// Its file for KVM; `None` if the kernel has no character device for it.
    pub(crate) fn second_file(&self) -> Option<SecondFile> {
        match self.address {
            Some(address) => second_file_at(address),
            None => Some(second_file(self.files.second.clone())),
        }
    }
}

/// The second file of a function that was handed over.
pub(crate) fn second_file_of(name: FunctionName) -> Option<SecondFile> {
    match name {
        FunctionName::Address(address) => second_file_at(address),
        FunctionName::PassedIn(_) => Some(second_file(None)),
    }
}

fn second_file_at(address: PciAddress) -> Option<SecondFile> {
    let path = address.cdev()?;
    Some(SecondFile::new(path.display().to_string(), move || DeviceFile::Cdev.open(address)))
}

fn second_file(file: Option<Arc<OwnedFd>>) -> SecondFile {
    SecondFile::new("its second file".to_owned(), move || match &file {
        Some(file) => file.try_clone(),
        None => Err(io::Error::new(io::ErrorKind::NotFound, NO_SECOND_FILE)),
    })
}
