//! The number of a character device, from sysfs.

use std::io;
use std::path::Path;

/// The number of the character device that the attribute at `path` names as `MAJOR:MINOR`.
///
/// # Errors
/// The errno of the read; [`io::ErrorKind::InvalidData`] if it is no such number.
pub fn device_number(path: impl AsRef<Path>) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    let number = text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)));
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
