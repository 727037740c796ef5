//! Tests of the vhost-user protocol: the whole server, from its socket to an emulated drive. The front-end sends raw
//! messages. Some tests compare the server with the reference daemon of the rust-vmm project.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod backend_channel;
mod bad_messages;
mod conversation;
mod descriptors;
mod dirty_log;
mod disorder;
mod gpa_addresses;
mod inflight;
mod lifecycle;
mod memory;
mod mistakes;
mod packed;
mod qemu;
mod reference;
mod requests;
mod rig;
mod rings;
mod shim;
mod skip_drain;
mod sockets;
mod succession;
mod vmm;
mod wire;
mod zoned;
