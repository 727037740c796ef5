//! A function whose bound device file another process has handed over.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use super::passed_in::check_device;
use super::{Attached, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, FunctionName, PciAddress, VfioError};
use crate::iommu::PageTable;
use crate::sys::{Cdev, Owner, device_number};

/// The device file is that of another device.
const ANOTHER_DEVICE: &str = "check the device file that was handed over";
const BUS_MASTER_ON: &str = "the predecessor has not stopped the function: bus master is on";

impl Attached {
    /// Takes the function `name`, whose open and bound device file is `file`. It is attached to `table` already, and
    /// stays bound and attached when it is dropped, until this process owns the iommufd of `table`.
    ///
    /// # Errors
    /// The step that failed, such as the check that the file is that of the function, or that bus master is off.
    pub fn handed_over(name: FunctionName, file: OwnedFd, table: Arc<PageTable>) -> Result<Self, VfioError> {
        let error = |step| move |source| VfioError::Kernel { name, step, source };
        check_file(name, &file).map_err(error(ANOTHER_DEVICE))?;
        let cdev = Cdev::handed_over(file, table.iommufd(), table.device());
        let cdev = Arc::new(cdev.map_err(error("look at the device that was handed over"))?);
        let page_table = table.id();
        let attached = Self { name: name.to_string(), table: Some(table), cdev };
        attached.check_stopped().map_err(error("read the command register"))?;
        attached.set_command(COMMAND_MEMORY, COMMAND_BUS_MASTER).map_err(error("write the command register"))?;
        // It is attached to this page table already: then the kernel changes nothing. It refuses the page table of another
        // iommufd than the one to which the device is bound.
        attached.cdev.attach(page_table).map_err(error("attach to the page table that was handed over"))?;
        Ok(attached)
    }

    fn check_stopped(&self) -> io::Result<()> {
        let mut command = [0; 2];
        self.cdev.read_region(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, &mut command)?;
        if u16::from_le_bytes(command) & COMMAND_BUS_MASTER != 0 {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, BUS_MASTER_ON));
        }
        Ok(())
    }

    /// The device's file, for another process.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn duplicate_file(&self) -> io::Result<OwnedFd> {
        self.cdev.duplicate()
    }

    /// Fails if another process has taken the function over.
    pub(super) fn check_ours(&self) -> io::Result<()> {
        match self.cdev.ownership().owner() {
            Owner::Successor => Err(io::Error::new(io::ErrorKind::ResourceBusy, "it has been handed over")),
            Owner::ThisProcess | Owner::Predecessor => Ok(()),
        }
    }
}

/// Fails unless `file` is an open character device of the function `name`. For one that was passed in, that is the only thing that
/// is known of it.
fn check_file(name: FunctionName, file: &OwnedFd) -> io::Result<()> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    match name {
        FunctionName::Address(address) => check_number(address, file),
        FunctionName::PassedIn(_) => check_device(file).map_err(invalid),
    }
}

fn check_number(address: PciAddress, file: &OwnedFd) -> io::Result<()> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    let cdev = address.cdev().ok_or_else(|| invalid("the function has no character device".to_owned()))?;
    let name = cdev.file_name().unwrap_or_default();
    let wanted = device_number(address.sysfs().join("vfio-dev").join(name).join("dev"))?;
    let found = rustix::fs::fstat(file)?.st_rdev;
    if found == wanted {
        return Ok(());
    }
    let (major, minor) = (rustix::fs::major(found), rustix::fs::minor(found));
    Err(invalid(format!("it is the device {major}:{minor}, not {}", cdev.display())))
}
