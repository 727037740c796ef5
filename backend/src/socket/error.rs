//! Why a socket cannot be opened.

use std::io;
use std::path::PathBuf;

/// Maximum length in bytes of a path in a `sockaddr_un`, without the terminating NUL (unix(7)).
pub(super) const MAX_SOCKET_PATH: usize = 107;

/// See the top of this file.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error("socket path {path:?} has {} bytes, the limit is {MAX_SOCKET_PATH}; choose a shorter one", path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens at the path.
    #[error("socket {path:?} is in use by {holder}; stop it or choose another path")]
    PathTaken {
        /// The path.
        path: PathBuf,
        /// The process.
        holder: String,
    },
    /// The path exists and is not a socket.
    #[error("{path:?} exists and is not a socket; remove it or choose another path")]
    NotASocketFile {
        /// The path.
        path: PathBuf,
    },
    /// A step on the way to a listening socket has failed.
    #[error("socket {path:?}: {step}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// The step that failed.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The socket cannot be given to another user or group.
    #[error(
        "socket {path:?}: give it to {owner}: {source}; run as root or with CAP_CHOWN, or, for a group, as one of its members"
    )]
    Owner {
        /// The path.
        path: PathBuf,
        /// The user and the group.
        owner: String,
        /// The errno.
        source: io::Error,
    },
    /// A descriptor that was passed in is not a UNIX stream socket.
    #[error("file descriptor {number} is not a UNIX stream socket: {found}")]
    NotASocket {
        /// The descriptor.
        number: i32,
        /// What is wrong with it, or the errno.
        found: String,
    },
    /// Socket activation passed several sockets.
    #[error("LISTEN_FDS={0}: exactly one socket can be served; give the socket unit one ListenStream=")]
    ActivationCount(String),
    /// A system call on a descriptor that was passed in failed.
    #[error("{step}: {source}")]
    System {
        /// The call.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
}
