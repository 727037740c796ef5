//! A vfio-user server for QEMU's `vfio-user-pci`, 10.1 or newer. The protocol carries VFIO's own interface in messages (QEMU:
//! `docs/interop/vfio-user.rst`). This module parses and answers them; [`passthrough`](crate::passthrough) executes them.
//!
//! ```text
//!  socket ─▶ Connection: whole messages ─▶ Session: one call for each command ─▶ Assignment
//!         ◀─ replies, in the order of the commands ◀─────────────────────────────┘
//! ```
//!
//! One thread serves it and never blocks on the front-end. A message that stays incomplete, or a reply that is not read, ends
//! the connection after 5 s. A front-end that does not negotiate a version is disconnected after 10 s, so that others get a turn.

mod assignment;
mod connection;
mod counters;
mod error;
mod server;
mod session;
mod version;
mod wire;

pub use error::Error;
pub use server::{EndReason, Server};
