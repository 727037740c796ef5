//! The socket on which this side speaks first (vhost-user: "Back-end communication"). It only carries notices: none asks for
//! an acknowledgement, so nothing here ever waits for the front-end, which may itself be waiting for us.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SendFlags, SocketType, send};

use super::Error;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no payload (vhost-user: "Back-end message types").
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// What a front-end passed with `SET_BACKEND_REQ_FD`.
pub(super) struct BackendChannel {
    socket: OwnedFd,
}

impl BackendChannel {
    /// Takes the front-end's socket.
    pub(super) fn new(socket: OwnedFd) -> Result<Self, Error> {
        let is_stream =
            socket_domain(&socket) == Ok(AddressFamily::UNIX) && socket_type(&socket) == Ok(SocketType::STREAM);
        let what = "its file descriptor is no UNIX stream socket";
        if is_stream {
            Ok(Self { socket })
        } else {
            Err(Error::Descriptors { request: "SET_BACKEND_REQ_FD".into(), what })
        }
    }

    /// Says that the configuration space has changed; the front-end will read it. False if the channel is of no further use.
    pub(super) fn config_changed(&self) -> bool {
        let message = CONFIG_CHANGE.map(u32::to_ne_bytes).concat();
        match send(&self.socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // With EAGAIN, earlier notices wait to be read; what is read after them is as new.
            Ok(_) | Err(Errno::AGAIN) => true,
            Err(errno) => {
                log::warn!("tell the front-end that the configuration has changed: {errno}");
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
    fn a_notice_is_a_header_alone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::new(ours.into()).unwrap();

        assert!(channel.config_changed());

        let mut bytes = [0; 12];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes.to_vec(), [2_u32, 1, 0].map(u32::to_ne_bytes).concat());
    }

    #[test]
    fn a_front_end_that_does_not_read_costs_nothing_and_one_that_has_gone_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = BackendChannel::new(ours.into()).unwrap();
        assert!((0..100_000).all(|_| channel.config_changed()));
        drop(theirs);
        assert!(!channel.config_changed());
    }

    #[test]
    fn what_is_no_socket_is_refused() {
        let file = rustix::fs::memfd_create("no socket", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(BackendChannel::new(file).is_err());
    }
}
