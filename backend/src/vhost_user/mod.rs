//! The vhost-user back-end: serves one front-end at a time, and applies its messages to memory, address space and engine.
//!
//! Everything here runs on one thread, in one loop ([`Server::run`]), so no state is shared. A drive with several disks has a
//! server for each; they share the address space and the device, not a session. A front-end is not trusted:
//! each message is answered or ends the connection. When the connection ends, for whatever reason, its vrings are stopped,
//! its memory is unmapped and its descriptors are closed.
//!
//! ```text
//!  Server ──▶ Connection ──▶ (codec) ──▶ Session ──▶ Vring ────────▶ engine
//!  sockets    whole messages             meaning └──▶ GuestMemory ──▶ hardware::AddressSpace, engine
//! ```

mod backend_channel;
mod config;
mod config_notifier;
mod connection;
mod dirty_log;
mod error;
mod features;
mod guest_memory;
mod hand_over;
mod inflight;
mod logs;
mod server;
mod session;
mod stored;
mod succession;
#[cfg(test)]
mod tests;
mod vring;

use std::sync::Arc;

pub use config_notifier::ConfigNotifier;
pub use dirty_log::LogError;
pub use error::Error;
pub use features::{ProtocolFeatures, VirtioFeatures};
pub use hand_over::{HandOver, Inheritance, MovableFunction, OpenStoreFn, SettleFn, monotonic_ns};
pub use server::Server;
pub use succession::Succession;

use crate::addr::IovaSlice;
use crate::engine::Engine;
use crate::hardware::AddressSpace;
use crate::kvm::Vmm;

/// The device that is served.
pub struct Device {
    /// The running data path.
    pub engine: Engine,
    /// The device's address space, into which guest memory is mapped.
    pub space: Arc<dyn AddressSpace>,
    /// The part of it that front-ends of this server have. No other server has any of it.
    pub slice: IovaSlice,
    /// Number of virtqueues offered, at most 256: as many as the engine was started with.
    pub queues: u16,
    /// The VMM process, in which the device is registered with KVM.
    pub vmm: Vmm,
    /// Features that are not offered although the disk has them.
    pub withheld: VirtioFeatures,
}

/// The output of `--print-capabilities` (QEMU: "Backend program conventions"): one JSON object.
#[must_use]
pub fn capabilities() -> &'static str {
    r#"{"type":"block","features":["read-only"]}"#
}
