//! A second process of this program, which does what the first one gives up the right to do (`sandbox/`): it opens the files of the
//! function again when the drive is back, starts a successor, and looks at how the front-end's process maps a file and who else uses
//! the function. Its answers are descriptors and numbers. It opens nothing but the files of the one function, which it knows from the
//! start, and starts nothing but the installed program with the arguments of the first process.
//!
//! ```text
//! serving process                       helper: forked at the start, without any descriptor of it
//!   watchdog    ── OPEN cdev ─────────▶ open("/dev/vfio/devices/vfioN")
//!   control     ── START, socket ─────▶ fork and exec, as by SIGUSR2 without a sandbox
//!   control     ── MAPS pid, file ────▶ read("/proc/PID/maps")
//!   control     ── HOLDER ────────────▶ who has a file of the function open, by readlink("/proc/PID/fd/N")
//!               ◀── the answer ────────
//! ```
//!
//! It ends when the serving process has ended: then the socket between them is closed. Signals that end the serving process do not
//! end it.

mod client;
mod message;
mod serve;

use std::io;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::sys;
use crate::vfio::PciAddress;
use client::Client;

/// Forks the helper, for the function at `address`, and has it do what this process will not be able to. To be called before any
/// thread is started, with SIGTERM, SIGINT and SIGUSR2 blocked.
///
/// # Errors
/// The errno of `socketpair` or `fork`.
pub fn start(address: Option<PciAddress>) -> io::Result<()> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let pid = sys::fork(theirs, move |socket| serve::run(&socket, address))?;
    log::debug!("the helper is process {pid}");
    Client::new(ours).install();
    Ok(())
}

#[cfg(test)]
mod tests;
