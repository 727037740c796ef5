//! The socket: speaks vhost-user with one front-end at a time and tells memory, address space and engine what it said.
//!
//! All of it runs on one thread, in one loop ([`Server::run`]), so no state here is shared. A front-end is believed in
//! nothing: whatever it sends, it gets an answer or is disconnected, and when it goes, by whatever way, its rings are
//! stopped, its memory is unmapped and its descriptors are closed.
//!
//! ```text
//!  Server ──▶ Connection ──▶ (codec) ──▶ Session ──▶ Ring ─────────▶ engine
//!  sockets    whole messages             meaning └──▶ GuestMemory ──▶ hardware::AddressSpace, engine
//! ```

mod backend_channel;
mod config;
mod connection;
mod error;
mod features;
mod guest_memory;
mod server;
mod session;
mod vring;

use std::sync::Arc;

pub use error::Error;
pub use features::{ProtocolFeatures, VirtioFeatures};
pub use server::{Announcer, Server};

use crate::engine::Engine;
use crate::hardware::AddressSpace;
use crate::kvm::Vmm;

/// What is served: a running engine, and the address space its device lives in.
pub struct Device {
    /// The data path.
    pub engine: Engine,
    /// Where guest memory is mapped for the device.
    pub space: Arc<dyn AddressSpace>,
    /// Virtqueues offered; as many as the engine was started with, at most 256.
    pub queues: u16,
    /// What the VM's own process must hear of it.
    pub vmm: Vmm,
}

/// The answer to `--print-capabilities` (QEMU: "Backend program conventions"): one JSON object that names what this program
/// can do.
#[must_use]
pub fn capabilities() -> &'static str {
    r#"{"type":"block","features":["read-only"]}"#
}
