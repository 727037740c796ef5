//! Conversations over the vhost-user socket: the server as a whole, from its socket to an emulated drive, with a front-end
//! that speaks bytes, and beside it the reference daemon of the rust-vmm project.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_messages;
mod lifecycle;
mod memory;
mod reference;
mod requests;
mod rig;
mod rings;
mod sockets;
mod wire;
