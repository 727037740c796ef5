//! Why QEMU was not asked, or has refused. Text from the monitor is escaped and cut off, because it ends in the log.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// See the top of this file.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The path is too long for the address of a socket, or contains a zero byte.
    #[error("connect to QEMU's monitor: {0}: a socket's path has at most 108 bytes: {1}")]
    Path(PathBuf, Errno),
    /// Nobody listens there, or the socket may not be used.
    #[error("connect to QEMU's monitor: {0}: {1}; start QEMU with -qmp unix:{0},server=on,wait=off")]
    Unreachable(PathBuf, Errno),
    /// The monitor is another virtual machine's.
    #[error(
        "the monitor at {path} is that of {found}, but {front_end} uses the function; give the monitor of that QEMU"
    )]
    OtherProcess {
        /// The socket.
        path: PathBuf,
        /// The process that listens there.
        found: String,
        /// The process that uses the function.
        front_end: u32,
    },
    /// The time is up.
    #[error("QEMU's monitor sent no {0} in time; it serves one client at a time, so give this program its own")]
    TimedOut(&'static str),
    /// The monitor has closed the connection.
    #[error("QEMU's monitor closed the connection and sent no {0}")]
    Closed(&'static str),
    /// The system call on the socket has failed.
    #[error("{0} of QEMU's monitor: {1}")]
    System(&'static str, io::Error),
    /// A line is longer, or the lines are more, than any answer needs.
    #[error("QEMU's monitor sent more than {0} bytes {1}")]
    TooMuch(usize, &'static str),
    /// What the monitor has sent is not QMP.
    #[error("QEMU's monitor sent no {0}, but `{1}`; another program listens there")]
    Garbage(&'static str, String),
    /// QEMU has answered with an error.
    #[error("{0}: QEMU's error: {1}")]
    Refused(&'static str, String),
    /// The virtual machine has no such device.
    #[error("QEMU has no device of type {TYPE} {0}", TYPE = super::DEVICE_TYPE)]
    NoDevice(String),
    /// The virtual machine has several such devices.
    #[error("QEMU has several devices of type {TYPE}: {0}; name the one of this function with --qmp-device", TYPE = super::DEVICE_TYPE)]
    Several(String),
    /// Unplugging it would end QEMU.
    #[error("{0} has MSI-X, and QEMU aborts when such a device of type {TYPE} is unplugged", TYPE = super::DEVICE_TYPE)]
    Msix(String),
}
