//! Descriptors and environment variables inherited from the parent process, and the credentials of a socket's peer.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Takes ownership of a descriptor that was open when this program started.
///
/// # Errors
/// EBADF if it is not open; [`io::ErrorKind::PermissionDenied`] if this program opened it, or if it has been taken already.
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
    // SAFETY: every descriptor this program opens is close-on-exec: std and rustix set the flag, and the session sets it on
    // those it receives. This one was not close-on-exec, so it came through exec and has no owner yet. The flag is set now,
    // so a second call fails.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes the descriptor of `owner` one of the file of `source`, close-on-exec. What it was of before is closed.
///
/// # Errors
/// The errno of `dup3`.
pub fn redirect(owner: &mut impl AsRawFd, source: impl AsFd) -> io::Result<()> {
    // SAFETY: the number belongs to `owner`, which is borrowed exclusively, so nobody uses it meanwhile and it stays open. `dup3`
    // replaces the file behind it and leaves the number, and its owner, as they are.
    let result = unsafe { libc::dup3(source.as_fd().as_raw_fd(), owner.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads an environment variable. Also removes it if this is the only thread, so that no child process inherits it.
#[must_use]
pub fn take_variable(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1) {
        // SAFETY: the count above shows that this is the only thread, so no other thread accesses the environment.
        unsafe { std::env::remove_var(name) };
    }
    Some(value)
}

/// Identity of the process at the other end of a UNIX socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process ID; `None` if the peer's PID namespace is not visible from here.
    pub pid: Option<u32>,
    /// User ID.
    pub uid: u32,
}

/// Credentials of the process that connected (for a client: that listens), recorded by the kernel at that time
/// (`SO_PEERCRED`).
///
/// # Errors
/// The errno of `getsockopt`.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("a dozen bytes");
    // SAFETY: `credentials` and `len` outlive the call. The kernel writes at most `len` bytes, the size of `credentials`.
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
    fn a_descriptor_opened_by_this_process_is_refused() {
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
