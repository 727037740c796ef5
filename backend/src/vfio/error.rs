//! Why a function cannot be acquired, and how to fix it. One errno of the kernel has several causes, so sysfs and `/proc` are
//! checked to find the right one.

use std::io;
use std::path::{Path, PathBuf};

use super::address::PciAddress;
use super::holder::holder;
use super::name::FunctionName;

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
    /// The container of IOMMU type 1 cannot be used.
    #[error("/dev/vfio/vfio: {source}; {advice}")]
    NoContainer {
        /// What is missing, and the fix.
        advice: &'static str,
        /// The errno of `open`, or that there is no IOMMU type 1.
        source: io::Error,
    },
    /// The group has no file.
    #[error(
        "{}: {source}; this kernel was built without CONFIG_VFIO_GROUP, or the device node was not passed in here; a container \
             needs --device {} --device /dev/vfio/vfio", path.display(), path.display()
    )]
    NoGroup {
        /// The file.
        path: PathBuf,
        /// The errno of `open`.
        source: io::Error,
    },
    /// The function can be used through neither interface.
    #[error("{iommufd}; nor can it be used by VFIO type1: {type1}")]
    NoInterface {
        /// Why not by iommufd.
        iommufd: Box<Self>,
        /// Why not by IOMMU type 1.
        type1: Box<Self>,
    },
    /// The device's file, its character device or the file of its group, cannot be opened.
    #[error(
        "{path}: {source}; give this user read and write access, for example with a udev rule \
             SUBSYSTEM==\"{subsystem}\", GROUP=\"vfio\", MODE=\"0660\""
    )]
    NoAccess {
        /// The file.
        path: PathBuf,
        /// Its subsystem, for the rule.
        subsystem: &'static str,
        /// The errno of `open`.
        source: io::Error,
    },
    /// A device node is missing, although the kernel has the device.
    #[error(
        "{}: {source}; the kernel has this device, but its node was not passed in here; a container needs --device {}",
        path.display(), path.display()
    )]
    NotPassedIn {
        /// The file.
        path: PathBuf,
        /// The errno of `open`.
        source: io::Error,
    },
    /// The device's control group forbids it.
    #[error(
        "{}: {source}; the node is there, but the control group of this process does not allow the device; a container needs \
             --device {}:{}:rw, a unit DeviceAllow={} rw", path.display(), path.display(), path.display(), path.display()
    )]
    NotAllowed {
        /// The file.
        path: PathBuf,
        /// The errno of `open`.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("{name}: in use by {holder}; only one process can use a function ({source})")]
    InUse {
        /// The function.
        name: FunctionName,
        /// The process, as far as this user can see.
        holder: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// A function of the same IOMMU group is bound to a host driver.
    #[error(
        "{name}: IOMMU group {group} is not viable: {siblings} must be bound to vfio-pci or to no driver as well ({source})"
    )]
    NotViable {
        /// The function.
        name: FunctionName,
        /// Its group.
        group: String,
        /// The functions bound to host drivers, as `ADDRESS (DRIVER)`.
        siblings: String,
        /// The errno of the bind.
        source: io::Error,
    },
    /// The platform cannot isolate interrupts.
    #[error(
        "{name}: {step}: {source}; its group is viable, so the cause is that this platform does not isolate \
             interrupts (no interrupt remapping). If every guest is trusted, boot with {module}.allow_unsafe_interrupts=1"
    )]
    UnsafeInterrupts {
        /// The function.
        name: FunctionName,
        /// The step.
        step: &'static str,
        /// The module whose parameter allows it.
        module: &'static str,
        /// The errno of the bind.
        source: io::Error,
    },
    /// A passed-in file is not the open character device of a function.
    #[error("the passed-in device: {0}; pass an open /dev/vfio/devices/vfioN")]
    NotADevice(String),
    /// A passed-in file cannot be bound, and nothing tells why.
    #[error("{name}: bind its passed-in file to iommufd: {source}; {advice}")]
    PassedIn {
        /// The function.
        name: FunctionName,
        /// The possible causes, and what to do.
        advice: &'static str,
        /// The errno of the bind.
        source: io::Error,
    },
    /// Another step failed.
    #[error("{name}: {step}: {source}")]
    Kernel {
        /// The function.
        name: FunctionName,
        /// The step.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl VfioError {
    /// Explains why a device node could not be opened. The file's mode leads to EACCES, a control group to EPERM
    /// (`devcgroup_check_permission`).
    pub(super) fn node(path: PathBuf, subsystem: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT) => Self::NotPassedIn { path, source },
            Some(libc::EPERM) => Self::NotAllowed { path, source },
            _ => Self::NoAccess { path, subsystem, source },
        }
    }

    /// Explains why `/dev/iommu` could not be opened.
    pub(super) fn no_iommufd(path: &Path, source: io::Error) -> Self {
        if source.raw_os_error() == Some(libc::EPERM) {
            return Self::NotAllowed { path: path.to_owned(), source };
        }
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
    pub(super) fn bind(name: FunctionName, source: io::Error) -> Self {
        let step = "bind to iommufd";
        let Some(address) = name.address().filter(|address| address.sysfs().exists()) else {
            return Self::bind_without_sysfs(name, source);
        };
        match source.raw_os_error() {
            Some(libc::EPERM) if !address.host_owned_siblings().is_empty() => Self::not_viable(address, source),
            Some(libc::EPERM) => match holder(address) {
                Some(holder) => Self::InUse { name, holder, source },
                None => Self::UnsafeInterrupts { name, step, module: "iommufd", source },
            },
            Some(libc::EBUSY | libc::EINVAL) => Self::in_use(address, source),
            _ => Self::Kernel { name, step, source },
        }
    }

    /// The same where nothing tells the causes of an errno apart.
    fn bind_without_sysfs(name: FunctionName, source: io::Error) -> Self {
        let advice = match source.raw_os_error() {
            Some(libc::EPERM) => {
                "another process uses it, a function of its IOMMU group is bound to a host driver, or this platform does not \
                 isolate interrupts; `vhost-device-vfio doctor` tells, where /sys and /proc are mounted"
            }
            Some(libc::EBUSY | libc::EINVAL) => {
                "another process uses it, or its file was bound before; pass a file that was opened for this process alone"
            }
            Some(libc::ENOTTY) => "it is no VFIO device; pass an open /dev/vfio/devices/vfioN",
            _ => "pass an open /dev/vfio/devices/vfioN, and an open /dev/iommu",
        };
        Self::PassedIn { name, advice, source }
    }

    pub(super) fn not_viable(address: PciAddress, source: io::Error) -> Self {
        let group = address.group().unwrap_or_default();
        Self::NotViable { name: address.into(), group, siblings: address.host_owned_siblings().join(", "), source }
    }

    fn in_use(address: PciAddress, source: io::Error) -> Self {
        let holder = holder(address).unwrap_or_else(|| "another process".to_owned());
        Self::InUse { name: address.into(), holder, source }
    }

    /// Explains why `/dev/vfio/vfio` cannot be used.
    pub(crate) fn no_container(source: io::Error) -> Self {
        if source.raw_os_error() == Some(libc::EPERM) {
            return Self::NotAllowed { path: Path::new("/dev/vfio/vfio").to_owned(), source };
        }
        let advice = match source.kind() {
            io::ErrorKind::PermissionDenied => {
                "give this user read and write access, for example with a udev rule KERNEL==\"vfio\", MODE=\"0666\""
            }
            io::ErrorKind::NotFound => {
                "the module `vfio` is not loaded (modprobe vfio_iommu_type1), or the device node was not passed in here; a \
                 container needs --device /dev/vfio/vfio"
            }
            _ => "this kernel offers no IOMMU type 1; load its module: modprobe vfio_iommu_type1",
        };
        Self::NoContainer { advice, source }
    }

    /// Explains why the file of the function's group cannot be opened (`vfio_group_fops_open`).
    pub(super) fn group(address: PciAddress, path: PathBuf, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EBUSY) => Self::in_use(address, source),
            Some(libc::EACCES | libc::EPERM) => Self::node(path, "vfio", source),
            _ => Self::NoGroup { path, source },
        }
    }

    /// Explains why IOMMU type 1 cannot be turned on for the function's group (`vfio_iommu_type1_attach_group`).
    pub(super) fn enable(address: PciAddress, source: io::Error) -> Self {
        let step = "turn IOMMU type 1 on (VFIO_SET_IOMMU)";
        match source.raw_os_error() {
            Some(libc::EPERM) => {
                Self::UnsafeInterrupts { name: address.into(), step, module: "vfio_iommu_type1", source }
            }
            _ => Self::Kernel { name: address.into(), step, source },
        }
    }
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
    fn each_error_of_a_group_has_the_fix_of_its_cause() {
        let (address, path) = ("0000:00:04.0".parse().unwrap(), || PathBuf::from("/dev/vfio/7"));
        let errno = io::Error::from_raw_os_error;
        let group = |number| VfioError::group(address, path(), errno(number)).to_string();
        let texts = [
            (group(libc::EACCES), "SUBSYSTEM==\"vfio\""),
            (group(libc::ENOENT), "--device /dev/vfio/7 --device /dev/vfio/vfio"),
            (group(libc::EBUSY), "in use by another process"),
            (group(libc::EPERM), "DeviceAllow=/dev/vfio/7 rw"),
            (VfioError::no_container(errno(libc::EPERM)).to_string(), "DeviceAllow=/dev/vfio/vfio rw"),
            (VfioError::enable(address, errno(libc::EPERM)).to_string(), "vfio_iommu_type1.allow_unsafe_interrupts=1"),
            (VfioError::enable(address, errno(libc::ENOMEM)).to_string(), "VFIO_SET_IOMMU"),
            (VfioError::no_container(errno(libc::EACCES)).to_string(), "KERNEL==\"vfio\""),
            (VfioError::no_container(errno(libc::ENOENT)).to_string(), "module `vfio` is not loaded"),
            (VfioError::no_container(io::ErrorKind::Unsupported.into()).to_string(), "modprobe vfio_iommu_type1"),
        ];
        for (text, part) in texts {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }

    #[test]
    fn a_device_node_that_is_missing_forbidden_or_of_another_user_has_its_own_fix() {
        let text = |number| {
            let source = io::Error::from_raw_os_error(number);
            VfioError::node(PathBuf::from("/dev/vfio/devices/vfio7"), "vfio-dev", source).to_string()
        };
        assert!(text(libc::ENOENT).ends_with("not passed in here; a container needs --device /dev/vfio/devices/vfio7"));
        assert!(text(libc::EPERM).contains("control group of this process does not allow the device"));
        assert!(text(libc::EACCES).contains("SUBSYSTEM==\"vfio-dev\""));
        let iommufd = VfioError::no_iommufd(Path::new("/dev/iommu"), io::Error::from_raw_os_error(libc::EPERM));
        assert!(iommufd.to_string().contains("DeviceAllow=/dev/iommu rw"), "{iommufd}");
    }

    #[test]
    fn without_access_to_iommufd_the_error_shows_a_udev_rule() {
        let error = VfioError::no_iommufd(Path::new("/dev/iommu"), io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(error.contains("KERNEL==\"iommu\""), "{error}");
    }
}
