//! The socket for messages of the back-end (vhost-user: "Back-end communication"). None of them requests an
//! acknowledgement: the front-end may itself be waiting for a reply, and waiting for it would be a deadlock.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, SocketType, send};

use super::Error;
use crate::rate_limited_log::SharedLog;

/// A front-end can close the channel and send another one, again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no payload (vhost-user: "Back-end message types").
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The socket that the front-end passed with `SET_BACKEND_REQ_FD`.
pub(super) struct BackendChannel {
    socket: OwnedFd,
}

impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl BackendChannel {
    /// # Errors
    /// `socket` is not a UNIX stream socket.
    pub(super) fn new(socket: OwnedFd) -> Result<Self, Error> {
        let is_stream =
            socket_domain(&socket) == Ok(AddressFamily::UNIX) && socket_type(&socket) == Ok(SocketType::STREAM);
        let problem = "its file descriptor is not a UNIX stream socket";
        if is_stream {
            Ok(Self { socket })
        } else {
            Err(Error::Descriptors { request: "SET_BACKEND_REQ_FD".into(), problem })
        }
    }

    /// Notifies the front-end that the configuration space has changed. False if the channel is broken.
    pub(super) fn config_changed(&self) -> bool {
        let message = CONFIG_CHANGE.map(u32::to_ne_bytes).concat();
        match send(&self.socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // EAGAIN: earlier notifications are unread. The front-end reads the configuration space after them.
            Ok(_) | Err(Errno::AGAIN) => true,
            Err(errno) => {
                LOG.warn(|| format!("notify the front-end of a changed configuration space: {errno}"));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_notification_is_only_a_header() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::new(ours.into()).unwrap();

        assert!(channel.config_changed());

        let mut bytes = [0; 12];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes.to_vec(), [2_u32, 1, 0].map(u32::to_ne_bytes).concat());
    }

    #[test]
    fn a_front_end_that_does_not_read_does_not_block_and_a_closed_channel_is_detected() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::new(ours.into()).unwrap();
        assert!((0..100_000).all(|_| channel.config_changed()));
        drop(theirs);
        assert!(!channel.config_changed());
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_refused() {
        let file = rustix::fs::memfd_create("no socket", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(BackendChannel::new(file).is_err());
    }
}
