//! The socket to which front-ends connect, independent of the protocol: a path, an inherited descriptor or one passed by
//! systemd; and the process at its other end.

mod access;
mod error;
mod file;
mod listen;
mod peer;

pub use access::{Access, GroupId, SocketMode, UserId};
pub use error::SocketError;
pub(crate) use file::SocketFile;
pub use file::SocketFileState;
pub use listen::{Endpoint, Listen};
pub(crate) use listen::{Listener, Socket, take_inherited};
pub use peer::{MapsFn, look_at_maps_by};
pub(crate) use peer::{Peer, maps_privately};
