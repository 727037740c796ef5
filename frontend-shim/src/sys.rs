//! Credentials of the peer of a socket. `rustix` has this call, but its process id cannot be 0. The kernel returns 0 for a
//! process that has no id in this pid namespace, such as a backend outside the VMM's container.
#![expect(unsafe_code, reason = "one system call; one of the two places where it is allowed")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{SO_PEERCRED, SOL_SOCKET, socklen_t, ucred};

/// The peer's process id and user id at the time it connected, or listened (`SO_PEERCRED`).
pub(crate) fn peer(socket: impl AsFd) -> io::Result<(i32, u32)> {
    let mut found = ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = socklen_t::try_from(size_of::<ucred>()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `size` bytes, and `found` has that many.
    if unsafe { libc::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, (&raw mut found).cast(), &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found.pid, found.uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(peer(&one).unwrap(), (own, rustix::process::geteuid().as_raw()));
    }
}
