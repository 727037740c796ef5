//! Why a function could not be taken, in words that name the fix. The kernel answers with a bare errno that stands for
//! several causes each, so sysfs is asked before the message is written.

use std::io;
use std::path::{Path, PathBuf};

use super::address::PciAddress;

/// Why a PCI function could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// No such function.
    #[error("{0}: no such PCI function on this machine; `ls /sys/bus/pci/devices` lists those there are")]
    NoSuchFunction(PciAddress),
    /// Another driver has it, or none.
    #[error(
        "{address}: wanted bound to vfio-pci, found {found}; bind it with `driverctl set-override {address} vfio-pci`, or: \
             echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override; {unbind}\
             echo {address} > /sys/bus/pci/drivers_probe"
    )]
    NotBound {
        /// The function.
        address: PciAddress,
        /// The driver it has, or "no driver".
        found: String,
        /// The command that takes it from that driver, with a trailing separator.
        unbind: String,
    },
    /// No IOMMU in front of the function.
    #[error(
        "{0}: no IOMMU stands in front of it; turn the IOMMU on in the firmware and on the kernel command line \
             (intel_iommu=on, amd_iommu=on)"
    )]
    NoIommu(PciAddress),
    /// The kernel offers no character device for it.
    #[error(
        "{0}: bound to vfio-pci, but it has no character device; this kernel was built without CONFIG_VFIO_DEVICE_CDEV"
    )]
    NoCdev(PciAddress),
    /// `/dev/iommu` cannot be opened.
    #[error("{path}: {source}; {advice}")]
    NoIommufd {
        /// The path that was tried.
        path: PathBuf,
        /// What is missing and how to get it.
        advice: String,
        /// The errno of `open`.
        source: io::Error,
    },
    /// The character device cannot be opened.
    #[error(
        "{path}: {source}; give this user read and write access to it, such as by a udev rule \
             SUBSYSTEM==\"vfio-dev\", GROUP=\"vfio\", MODE=\"0660\""
    )]
    NoAccess {
        /// The character device.
        path: PathBuf,
        /// The errno of `open`.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("{address}: in use by {holder}; a function has one user at a time ({source})")]
    InUse {
        /// The function.
        address: PciAddress,
        /// Who, as far as this user may know.
        holder: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// A function of the same IOMMU group is held by a host driver.
    #[error(
        "{address}: IOMMU group {group} is not viable: {siblings} must be bound to vfio-pci or to no driver as well ({source})"
    )]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its group.
        group: String,
        /// The functions in the way, with their drivers.
        siblings: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// The platform cannot isolate interrupts.
    #[error(
        "{address}: bind to iommufd: {source}; no other function of its group is in the way, so this platform does not \
             isolate interrupts (no interrupt remapping). If every guest is trusted, boot with iommufd.allow_unsafe_interrupts=1"
    )]
    UnsafeInterrupts {
        /// The function.
        address: PciAddress,
        /// The errno of the bind.
        source: io::Error,
    },
    /// Any other step that failed.
    #[error("{address}: {what}: {source}")]
    Kernel {
        /// The function.
        address: PciAddress,
        /// The step.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl VfioError {
    /// Explains why `/dev/iommu` could not be opened.
    pub(super) fn no_iommufd(path: &Path, source: io::Error) -> Self {
        let advice = if source.kind() == io::ErrorKind::PermissionDenied {
            "give this user read and write access to it, such as by a udev rule KERNEL==\"iommu\", GROUP=\"vfio\", MODE=\"0660\""
                .to_owned()
        } else if Path::new("/sys/class/misc/iommu").exists() {
            "the kernel has it, so it was not passed in here; a container needs --device /dev/iommu".to_owned()
        } else {
            let release = rustix::system::uname().release().to_string_lossy().into_owned();
            format!(
                "kernel {release} offers none: it was built without CONFIG_IOMMUFD, or the module `iommufd` is not loaded"
            )
        };
        Self::NoIommufd { path: path.to_owned(), advice, source }
    }

    /// Explains why binding the function to iommufd failed (`vfio_df_ioctl_bind_iommufd`, `iommufd_device_bind`).
    pub(super) fn bind(address: PciAddress, source: io::Error) -> Self {
        let siblings = address.held_siblings();
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
            _ => Self::Kernel { address, what: "bind to iommufd", source },
        }
    }
}

/// Another process that has the function's character device or its group open, as far as `/proc` tells this user.
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
        let wanted = if kernel_has_it { "--device /dev/iommu" } else { "built without CONFIG_IOMMUFD" };
        assert!(error.contains(wanted), "{error}");
    }

    #[test]
    fn a_denied_iommufd_shows_the_rule_that_allows_it() {
        let error = VfioError::no_iommufd(Path::new("/dev/iommu"), io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(error.contains("KERNEL==\"iommu\""), "{error}");
    }
}
