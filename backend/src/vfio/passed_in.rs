//! A device whose open character device was passed to this process. Nothing here needs a path.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

use super::{Bound, FunctionName, VfioError};
use crate::sys::{Ioas, Iommufd};

/// See the top of this file. It is not bound yet.
pub struct PassedIn {
    name: FunctionName,
    file: OwnedFd,
}

impl PassedIn {
    /// Takes `file`, the open `/dev/vfio/devices/vfioN`.
    ///
    /// # Errors
    /// [`VfioError::NotADevice`]. Whether it is a VFIO device shows when it is bound.
    pub fn new(file: OwnedFd) -> Result<Self, VfioError> {
        check_device(&file).map_err(VfioError::NotADevice)?;
        Ok(Self { name: FunctionName::of_file(&file), file })
    }

    /// Its name, with its address if the kernel tells it.
    #[must_use]
    pub fn name(&self) -> FunctionName {
        self.name
    }

    /// Binds it to iommufd. Its DMA is blocked until it is attached.
    ///
    /// # Errors
    /// Why it cannot be bound.
    pub fn bind(self, iommufd: &Iommufd, ioas: &Ioas) -> Result<Bound, VfioError> {
        Bound::new(self.name, self.file, iommufd, ioas)
    }
}

/// Fails unless `file` is a character device that is open for reading and writing. Says what was found.
pub(super) fn check_device(file: impl AsFd) -> Result<(), String> {
    let kind = fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode)).map_err(|errno| errno.to_string())?;
    if kind != FileType::CharacterDevice {
        return Err(format!("it is {}", describe(kind)));
    }
    let access = fcntl_getfl(&file).map_err(|errno| errno.to_string())? & OFlags::RWMODE;
    if access == OFlags::RDWR { Ok(()) } else { Err("it is not open for reading and writing".to_owned()) }
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Socket => "a socket",
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::BlockDevice => "a block device",
        _ => "a file of another kind",
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_no_open_device_is_refused_with_what_it_is() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let read_only = File::open("/dev/null").unwrap();
        for (file, found) in [
            (OwnedFd::from(socket), "it is a socket"),
            (pipe, "it is a pipe"),
            (read_only.into(), "it is not open for reading and writing"),
        ] {
            let error = PassedIn::new(file).err().unwrap().to_string();
            assert!(error.contains(found) && error.contains("/dev/vfio/devices/vfioN"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_open_for_reading_and_writing_is_taken() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        assert!(!PassedIn::new(null.into()).unwrap().name().is_by_path());
    }
}
