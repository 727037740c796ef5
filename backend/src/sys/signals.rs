//! Termination signals as a readable descriptor, so that the control loop can wait for them with epoll.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use vmm_sys_util::signal::{Error, block_signal};

/// Blocks `signals` for this thread and for all threads that it starts later. Returns a descriptor that becomes readable
/// when one of them arrives.
///
/// # Errors
/// The errno of `signalfd`; [`io::ErrorKind::Other`] if a signal cannot be blocked.
pub fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    for signal in signals {
        match block_signal(*signal) {
            // A process that starts its successor passes its blocked signals on.
            Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => {}
            Err(error) => return Err(io::Error::other(format!("block signal {signal}: {error:?}"))),
        }
    }
    // SAFETY: `sigset_t` is plain data, and `sigemptyset` initialises it before it is read.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    };
    // SAFETY: `set` is initialised and outlives the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `signalfd` has just returned this descriptor, and it has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
