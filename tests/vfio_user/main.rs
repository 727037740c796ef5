//! Tests of the vfio-user protocol: the whole server, from its socket to an emulated NVMe function. The front-end sends raw
//! messages. One test uses the client of the rust-vmm project's `vfio_user` crate.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_messages;
mod client;
mod coherency;
mod config_space;
mod conversation;
mod host_request;
mod interrupts;
mod lifecycle;
mod limits;
mod log_lines;
mod memory;
mod nvme;
mod own_file;
mod peer;
mod rig;
