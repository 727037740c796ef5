//! The socket on which front-ends come, whatever protocol they speak: a path, an inherited descriptor or one passed by
//! systemd; and who is at its other end.

mod error;
mod listen;
mod peer;

pub use error::SocketError;
pub use listen::{Endpoint, Listen};
pub(crate) use listen::{Listener, Socket};
pub(crate) use peer::Peer;
