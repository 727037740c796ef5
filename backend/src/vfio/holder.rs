//! Which other process uses a function. A process that may not look at the descriptors of others has another one look.

use std::path::Path;
use std::sync::OnceLock;

use super::address::PciAddress;

/// Finds the process, other than this one, that uses the function at an address.
pub type FindFn = dyn Fn(PciAddress) -> Option<u32> + Send + Sync;

static FINDER: OnceLock<Box<FindFn>> = OnceLock::new();

/// From now on `find` looks for holders. Only the first call has an effect.
pub fn find_holder_by(find: Box<FindFn>) {
    // A second finder would be for the same process.
    let _ = FINDER.set(find);
}

/// Another process that has the function's character device, its group or a file from the group open, as far as this user can see
/// in `/proc`; not one of `except`.
#[must_use]
pub fn find_holder(address: PciAddress, except: &[u32]) -> Option<u32> {
    let files: Vec<_> = address.cdev().into_iter().chain(address.group_file()).collect();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if except.contains(&pid) {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let is_of_device = |fd: &Path| match std::fs::read_link(fd) {
            Ok(target) if target == Path::new(DEVICE_OF_GROUP) => is_named(fd, address),
            Ok(target) => files.contains(&target),
            Err(_) => false,
        };
        if descriptors.flatten().any(|fd| is_of_device(&fd.path())) {
            return Some(pid);
        }
    }
    None
}

/// The process that uses the function, for people.
pub(super) fn holder(address: PciAddress) -> Option<String> {
    let pid = FINDER.get().map_or_else(|| find_holder(address, &[std::process::id()]), |find| find(address))?;
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", command.trim()))
}

/// What the kernel calls every file from `VFIO_GROUP_GET_DEVICE_FD`.
const DEVICE_OF_GROUP: &str = "anon_inode:[vfio-device]";

/// True if the kernel says that `fd`, in `/proc/PID/fd`, is a file of the device. Older kernels do not name the device.
fn is_named(fd: &Path, address: PciAddress) -> bool {
    let process = fd.parent().and_then(Path::parent);
    let info = process.zip(fd.file_name()).map(|(process, number)| process.join("fdinfo").join(number));
    let info = info.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    info.lines().any(|line| line.starts_with("vfio-device-syspath:") && line.ends_with(&address.to_string()))
}
