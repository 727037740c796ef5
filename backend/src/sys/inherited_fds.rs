//! What a process is given rather than makes: descriptors and variables from whoever started it, and the identity of the
//! process at the other end of a socket.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Takes possession of a descriptor that was open when this program started.
///
/// # Errors
/// EBADF if it is not open; [`io::ErrorKind::PermissionDenied`] if it was opened by this program itself or has been taken
/// already.
pub fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed for the two fcntl calls below only; they fail with EBADF if `number` is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: every descriptor this program opens is close-on-exec (Rust's std and rustix see to it, and the session sets
    // the flag on those it receives); this one was not, so it came through exec and nobody owns it. It is marked now, so
    // that it cannot be taken twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Reads an environment variable and, while no other thread could be reading the environment, removes it, so that no child
/// takes it for its own.
#[must_use]
pub fn take_variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1) {
        // SAFETY: this is the only thread, counted just now, and it is here, so nobody reads or writes the environment.
        unsafe { std::env::remove_var(name) };
    }
    Some(value)
}

/// Who is at the other end of a UNIX socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id; `None` if the process lives in a PID namespace that cannot be seen from here.
    pub pid: Option<u32>,
    /// User id.
    pub uid: u32,
}

/// The process that connected (or, for a client, the one that listens), as the kernel noted it then (`SO_PEERCRED`).
///
/// # Errors
/// The errno of `getsockopt`.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("a dozen bytes");
    // SAFETY: `credentials` and `len` live through the call and `len` is the size of the former, which the kernel obeys.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(credentials.pid).ok().filter(|pid| *pid != 0);
    Ok(Credentials { pid, uid: credentials.uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_of_our_own_is_not_inherited() {
        let (ours, _peer) = UnixStream::pair().unwrap();

        let error = inherit(ours.as_raw_fd()).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn an_inherited_descriptor_can_be_taken_once() {
        let (inherited, _peer) = UnixStream::pair().unwrap();
        fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
        let number = inherited.into_raw_fd();

        let taken = inherit(number).unwrap();

        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(inherit(number).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn a_closed_descriptor_is_ebadf() {
        assert_eq!(inherit(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(inherit(9999).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn the_peer_of_a_socket_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();

        let credentials = peer_credentials(&one).unwrap();

        assert_eq!(credentials.pid, Some(std::process::id()));
    }
}
