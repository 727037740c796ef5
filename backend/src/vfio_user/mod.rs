//! The vfio-user conversation with a virtual machine monitor: QEMU's `vfio-user-pci`, 10.1 or newer. The protocol is VFIO's
//! own interface as messages (QEMU: `docs/interop/vfio-user.rst`); what they mean is for [`passthrough`](crate::passthrough).
//!
//! ```text
//!  socket ─▶ Connection: whole messages ─▶ Session: one match, one call an arm ─▶ Assignment
//!         ◀─ replies, in the order of the commands ◀──────────────────────────────┘
//! ```
//!
//! One thread serves it. Nothing here waits for the other side: a message that does not come to its end, or a reply that
//! nobody reads, ends the conversation after 5 s.

mod connection;
mod error;
mod holder;
mod server;
mod session;
mod version;
mod wire;

pub use error::Error;
pub use server::{Ended, Server};
