//! Conversations over the vfio-user socket: the server as a whole, from its socket to an emulated NVMe function, with a
//! front-end that speaks bytes, and beside it the client of the rust-vmm project's `vfio_user` crate.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_messages;
mod client;
mod coherency;
mod config_space;
mod conversation;
mod interrupts;
mod lifecycle;
mod memory;
mod nvme;
mod peer;
mod rig;
