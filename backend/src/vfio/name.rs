//! Which function: the one at an address, or one whose open file was passed to this process. The latter may run where neither sysfs
//! nor procfs can be read, so what these say of it can be unknown.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use super::PciAddress;

/// How descriptions of a hand-over name a function whose file was passed in.
const PASSED_IN: &str = "fd";

/// See the top of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FunctionName {
    /// Found in sysfs, and opened by its path.
    Address(PciAddress),
    /// Passed in as an open file; its address if the kernel tells it.
    PassedIn(Option<PciAddress>),
}

impl From<PciAddress> for FunctionName {
    fn from(address: PciAddress) -> Self {
        Self::Address(address)
    }
}

/// For a person.
impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Some(address) => address.fmt(f),
            None => f.pad("the passed-in device"),
        }
    }
}

impl FunctionName {
    /// The function of an open VFIO device file. Linux 6.18 and newer tell its address, in procfs.
    pub(crate) fn of_file(file: impl AsFd) -> Self {
        let path = format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd());
        Self::PassedIn(std::fs::read_to_string(path).ok().as_deref().and_then(address_in))
    }

    /// Its address, if it is known.
    #[must_use]
    pub fn address(&self) -> Option<PciAddress> {
        match self {
            Self::Address(address) => Some(*address),
            Self::PassedIn(address) => *address,
        }
    }

    /// True if it is opened by its path, and can be opened again.
    #[must_use]
    pub fn is_by_path(&self) -> bool {
        matches!(self, Self::Address(_))
    }

    /// Whether it is an SR-IOV virtual function; `None` if sysfs does not tell.
    #[must_use]
    pub fn is_virtual_function(&self) -> Option<bool> {
        self.address().filter(|address| address.sysfs().exists()).map(|address| address.is_virtual_function())
    }

    /// As a description has it.
    #[must_use]
    pub fn in_description(&self) -> String {
        match self {
            Self::Address(address) => address.to_string(),
            Self::PassedIn(_) => PASSED_IN.to_owned(),
        }
    }

    /// The name in a description, of the function whose file is `file`. `None` if it is no name.
    pub(crate) fn of_description(text: &str, file: impl AsFd) -> Option<Self> {
        if text == PASSED_IN {
            return Some(Self::of_file(file));
        }
        text.parse().ok().map(Self::Address)
    }
}

/// The address in the text of `/proc/PID/fdinfo/FD`: the last part of the device's path in sysfs (`vfio_device_show_fdinfo`).
fn address_in(fdinfo: &str) -> Option<PciAddress> {
    let path = fdinfo.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"))?;
    Path::new(path.trim()).file_name()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_an_open_device_is_the_last_part_of_its_path() {
        let text = "pos:\t0\nflags:\t02\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:03.0/0000:01:00.2\n";
        assert_eq!(address_in(text).unwrap().to_string(), "0000:01:00.2");
        assert_eq!(address_in("pos:\t0\n"), None);
        assert_eq!(address_in("vfio-device-syspath: /sys/devices/mdev/a5b1\n"), None);
    }

    #[test]
    fn a_file_that_does_not_tell_its_address_has_a_name_for_people_and_one_for_a_successor() {
        let (file, _other) = rustix::pipe::pipe().unwrap();
        let name = FunctionName::of_file(&file);
        assert_eq!(name.to_string(), "the passed-in device");
        assert_eq!((name.is_virtual_function(), name.is_by_path()), (None, false));
        assert_eq!(FunctionName::of_description(&name.in_description(), &file), Some(name));
        assert_eq!(FunctionName::of_description("../00:04.0", &file), None);
    }
}
