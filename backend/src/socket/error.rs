//! Why there is no socket to serve.

use std::io;
use std::path::PathBuf;

/// Bytes of a path that fit into `sockaddr_un` with a terminating zero (unix(7)).
pub(super) const MAX_SOCKET_PATH: usize = 107;

/// See the top of this file.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error("socket path {path:?} has {} bytes, at most {MAX_SOCKET_PATH} fit; choose a shorter one", path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Someone listens there.
    #[error("socket {path:?} is in use by {holder}; stop it or choose another path")]
    PathTaken {
        /// The path.
        path: PathBuf,
        /// The process.
        holder: String,
    },
    /// Something that is not a socket is in the way.
    #[error("{path:?} exists and is not a socket; remove it or choose another path")]
    NotASocketFile {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused a step on the way to a listening socket.
    #[error("socket {path:?}: {what}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// A descriptor that was passed in is not what it should be.
    #[error("file descriptor {number} is no UNIX stream socket: {found}")]
    NotASocket {
        /// The descriptor.
        number: i32,
        /// What it is, or the errno.
        found: String,
    },
    /// Socket activation passed several sockets.
    #[error("LISTEN_FDS={0}: exactly one socket is served; give the socket unit one ListenStream=")]
    ActivationCount(String),
    /// A system call on a descriptor that was passed in failed.
    #[error("{what}: {source}")]
    System {
        /// The call.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}
