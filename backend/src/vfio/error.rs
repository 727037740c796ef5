//! Why a function cannot be acquired, and how to fix it. One errno of the kernel has several causes, so sysfs and `/proc` are
//! checked to find the right one.

use std::io;
use std::path::{Path, PathBuf};

use super::address::PciAddress;

/// Why a PCI function cannot be acquired.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// No such function.
    #[error("{0}: no such PCI function on this machine; `ls /sys/bus/pci/devices` lists all functions")]
    NoSuchFunction(PciAddress),
    /// It is bound to another driver, or to none.
    #[error(
        "{address}: {found}, must be bound to vfio-pci; bind it with `driverctl set-override {address} vfio-pci`, or: \
             echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override; {unbind}\
             echo {address} > /sys/bus/pci/drivers_probe"
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// "bound to DRIVER", or "bound to no driver".
        found: String,
        /// The command that unbinds it from that driver, with a trailing separator; else empty.
        unbind: String,
    },
    /// The function is not behind an IOMMU.
    #[error(
        "{0}: it is not behind an IOMMU; turn the IOMMU on in the firmware and on the kernel command line \
             (intel_iommu=on, amd_iommu=on)"
    )]
    NoIommu(PciAddress),
    /// The kernel has no VFIO character device for it.
    #[error(
        "{0}: bound to vfio-pci, but it has no character device; this kernel was built without CONFIG_VFIO_DEVICE_CDEV"
    )]
    NoCdev(PciAddress),
    /// `/dev/iommu` cannot be opened.
    #[error("{path}: {source}; {advice}")]
    NoIommufd {
        /// The path that was tried.
        path: PathBuf,
        /// What is missing, and the fix.
        advice: String,
        /// The errno of `open`.
        source: io::Error,
    },
    /// The character device cannot be opened.
    #[error(
        "{path}: {source}; give this user read and write access, for example with a udev rule \
             SUBSYSTEM==\"vfio-dev\", GROUP=\"vfio\", MODE=\"0660\""
    )]
    NoAccess {
        /// The character device.
        path: PathBuf,
        /// The errno of `open`.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("{address}: in use by {holder}; only one process can use a function ({source})")]
    InUse {
        /// The function.
        address: PciAddress,
        /// The process, as far as this user can see.
        holder: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// A function of the same IOMMU group is bound to a host driver.
    #[error(
        "{address}: IOMMU group {group} is not viable: {siblings} must be bound to vfio-pci or to no driver as well ({source})"
    )]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: String,
        /// The functions bound to host drivers, as `ADDRESS (DRIVER)`.
        siblings: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// The platform cannot isolate interrupts.
    #[error(
        "{address}: bind to iommufd: {source}; its group is viable, so the cause is that this platform does not isolate \
             interrupts (no interrupt remapping). If every guest is trusted, boot with iommufd.allow_unsafe_interrupts=1"
    )]
    UnsafeInterrupts {
        /// The function.
        address: PciAddress,
        /// The errno of the bind.
        source: io::Error,
    },
    /// Another step failed.
    #[error("{address}: {step}: {source}")]
    Kernel {
        /// The function.
        address: PciAddress,
        /// The step.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl VfioError {
    /// Explains why `/dev/iommu` could not be opened.
    pub(super) fn no_iommufd(path: &Path, source: io::Error) -> Self {
        let advice = if source.kind() == io::ErrorKind::PermissionDenied {
            "give this user read and write access, for example with a udev rule KERNEL==\"iommu\", GROUP=\"vfio\", MODE=\"0660\""
                .to_owned()
        } else if Path::new("/sys/class/misc/iommu").exists() {
            "the kernel has iommufd, but the device node was not passed in here; a container needs --device /dev/iommu"
                .to_owned()
        } else {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            format!(
                "kernel {release} has no iommufd: it was built without CONFIG_IOMMUFD, or the module `iommufd` is not loaded"
            )
        };
        Self::NoIommufd { path: path.to_owned(), advice, source }
    }

    /// Explains why binding the function to iommufd failed (`vfio_df_ioctl_bind_iommufd`, `iommufd_device_bind`).
    pub(super) fn bind(address: PciAddress, source: io::Error) -> Self {
        let siblings = address.host_owned_siblings();
        match source.raw_os_error() {
            Some(libc::EPERM) if !siblings.is_empty() => {
                let group = address.group().unwrap_or_default();
                Self::NotViable { address, group, siblings: siblings.join(", "), source }
            }
            Some(libc::EPERM) => match holder(address) {
                Some(holder) => Self::InUse { address, holder, source },
                None => Self::UnsafeInterrupts { address, source },
            },
            Some(libc::EBUSY | libc::EINVAL) => {
                let holder = holder(address).unwrap_or_else(|| "another process".to_owned());
                Self::InUse { address, holder, source }
            }
            _ => Self::Kernel { address, step: "bind to iommufd", source },
        }
    }
}

/// Another process that has the function's character device or its group open, as far as this user can see in `/proc`.
fn holder(address: PciAddress) -> Option<String> {
    let group = address.group().map(|group| Path::new("/dev/vfio").join(group));
    let files: Vec<_> = address.cdev().into_iter().chain(group).collect();
    let own = std::process::id().to_string();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name().into_string().unwrap_or_default();
        if name == own || !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let mut targets = descriptors.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        if targets.any(|target| files.contains(&target)) {
            let command = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {name} ({})", command.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_iommufd_names_the_kernel_option_or_the_container_option() {
        let error = VfioError::no_iommufd(Path::new("/dev/iommu"), io::ErrorKind::NotFound.into()).to_string();
        let kernel_has_it = Path::new("/sys/class/misc/iommu").exists();
        let expected = if kernel_has_it { "--device /dev/iommu" } else { "built without CONFIG_IOMMUFD" };
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn without_access_to_iommufd_the_error_shows_a_udev_rule() {
        let error = VfioError::no_iommufd(Path::new("/dev/iommu"), io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(error.contains("KERNEL==\"iommu\""), "{error}");
    }
}
