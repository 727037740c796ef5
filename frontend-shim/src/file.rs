//! Checks a descriptor that a peer sent before it is passed to KVM. KVM checks again, but this check gives a clear error, and
//! it also rejects a bound file, which KVM would accept.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat, major, minor};

use crate::kvm;
use crate::wire::Reason;

/// Accepts a VFIO device file that was never bound, and a VFIO group file.
///
/// # Errors
/// [`Reason::NotVfio`] or [`Reason::Bound`].
pub(crate) fn check(file: BorrowedFd<'_>) -> Result<(), Reason> {
    let stat = fstat(file).map_err(|_| Reason::NotVfio)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return Err(Reason::NotVfio);
    }
    let class = format!("/sys/dev/char/{}:{}/subsystem", major(stat.st_rdev), minor(stat.st_rdev));
    match std::fs::read_link(&class).as_deref().map(Path::file_name) {
        Ok(Some(name)) if name == "vfio-dev" => {
            // KVM would keep it open, and with it the device and its pinned memory, after the backend has died.
            if kvm::is_bound(file) { Err(Reason::Bound) } else { Ok(()) }
        }
        Ok(Some(name)) if name == "vfio" => Ok(()),
        Ok(_) => Err(Reason::NotVfio),
        // In a chroot without /sys, only KVM checks.
        Err(_) => Ok(()),
    }
}

/// The path of an open file, for the log.
pub(crate) fn name(file: BorrowedFd<'_>) -> PathBuf {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_else(|_| "a device".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_regular_file_a_socket_and_another_device_are_not_vfio_files() {
        let file = File::open("/proc/self/exe").unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        for not_vfio in [file.as_fd(), socket.as_fd(), null.as_fd()] {
            assert_eq!(check(not_vfio), Err(Reason::NotVfio));
        }
    }

    #[test]
    fn a_name_is_the_path() {
        assert_eq!(name(File::open("/dev/null").unwrap().as_fd()), Path::new("/dev/null"));
    }
}
