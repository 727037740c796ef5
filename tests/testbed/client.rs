//! A vhost-user-blk client. The `vhost` crate implements the front-end's side of the protocol; the driver's side of the rings is
//! implemented here and shares no code with the server under test.
//!
//! All rings are in one memory file. Each request has a slot with fixed addresses for its header, data and status. So a connected
//! client allocates nothing, and a load measures the server with little overhead by the client.

mod guest;
mod packed;
mod ram;
mod ring;
mod split;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use ram::Ram;

pub use guest::{Copy, Guest, NextFrontEnd, NextMemory, Region};
pub use ram::Buffer;
pub use ring::{Completion, Request, Ring};

/// Time-out for an answer to a message, so that a hanging server fails the test.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX and VIRTIO_F_RING_PACKED (virtio 1.2 §6).
const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_BLK_F_FLUSH (virtio 1.2 §5.2.3): without it each write must be durable before it ends.
const FLUSH: u64 = 1 << 9;

/// What to request from a server. Connecting fails if the server does not offer it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Virtqueues to use.
    pub queues: usize,
    /// Requests in flight on each, at most 256.
    pub depth: u16,
    /// Largest request, bytes; a multiple of 4096.
    pub bytes: usize,
    /// Use indirect descriptors.
    pub indirect: bool,
    /// Use the event index.
    pub event_idx: bool,
    /// Use packed rings.
    pub packed: bool,
    /// Offset of the data in a slot, bytes; the largest request is that much smaller.
    pub shift: usize,
}

impl Shape {
    /// This shape with each kind of ring.
    #[must_use]
    pub fn kinds(self) -> [Self; 8] {
        std::array::from_fn(|n| Self { packed: n & 1 != 0, indirect: n & 2 != 0, event_idx: n & 4 != 0, ..self })
    }

    /// The virtio features that it needs.
    fn features(self) -> u64 {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let kinds = [(self.indirect, INDIRECT), (self.event_idx, EVENT_IDX), (self.packed, PACKED)];
        kinds.iter().filter(|(wanted, _)| *wanted).fold(VERSION_1 | protocol, |sum, (_, bit)| sum | bit)
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self { queues: 1, depth: 16, bytes: 64 << 10, indirect: true, event_idx: true, packed: false, shift: 0 }
    }
}

/// Why an operation failed.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A connected front-end with running rings.
pub struct Client {
    frontend: Frontend,
    /// The virtqueues in use.
    pub rings: Vec<Ring>,
    capacity: u64,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// The socket's error, or what the server refused.
    pub fn connect(path: &Path, shape: Shape) -> Result<Self, Error> {
        Self::new(UnixStream::connect(path)?, shape)
    }

    /// Sets up features, memory and rings over a connected socket.
    ///
    /// # Errors
    /// What the server refused.
    pub fn new(socket: UnixStream, shape: Shape) -> Result<Self, Error> {
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut frontend = Frontend::from_stream(socket, shape.queues as u64);
        frontend.set_owner()?;
        let features = negotiate(&mut frontend, shape, VhostUserProtocolFeatures::empty())?;
        let ram = Ram::new(shape.queues * ring::bytes_needed(shape))?;
        frontend.set_mem_table(&[ram.region()])?;
        let mut rings = Vec::new();
        for index in 0..shape.queues {
            let ring = Ring::new(&ram, index, shape, features)?;
            ring.start(&mut frontend, index)?;
            rings.push(ring);
        }
        let capacity = capacity(&mut frontend)?;
        Ok(Self { frontend, rings, capacity })
    }

    /// Size of the disk, sectors of 512 bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Stops ring `index`.
    ///
    /// # Errors
    /// What the server answered.
    pub fn stop(&self, index: usize) -> Result<u32, Error> {
        Ok(self.frontend.get_vring_base(index)?)
    }

    /// Writes `bytes` at `sector` and waits.
    ///
    /// # Errors
    /// The request's status, or that it did not end within 20 s.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> Result<(), Error> {
        let ring = &mut self.rings[0];
        let slot = ring.submit(Request::Write { sector, bytes: bytes.len() });
        ring.set_data(slot, bytes);
        self.finish().map(|_| ())
    }

    /// Fills `bytes` from `sector` and waits.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let slot = self.rings[0].submit(Request::Read { sector, bytes: bytes.len() });
        // Overwrite the data of earlier requests, so that it cannot be taken for the data of this one.
        bytes.fill(0xcc);
        self.rings[0].set_data(slot, bytes);
        self.finish()?;
        self.rings[0].data(slot, bytes);
        Ok(())
    }

    /// Flushes and waits.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn flush(&mut self) -> Result<(), Error> {
        self.rings[0].submit(Request::Flush);
        self.finish().map(|_| ())
    }

    /// Waits for the one request in flight on ring 0.
    fn finish(&mut self) -> Result<u16, Error> {
        let ring = &mut self.rings[0];
        ring.publish();
        match ring.wait(ANSWER_LIMIT)? {
            Some(Completion { slot, status: 0, .. }) => Ok(slot),
            Some(Completion { status, .. }) => Err(format!("the request ended with status {status}").into()),
            None => Err("the request did not end".into()),
        }
    }
}

/// Negotiates virtio and protocol features, `more` among them; returns the virtio features.
fn negotiate(frontend: &mut Frontend, shape: Shape, more: VhostUserProtocolFeatures) -> Result<u64, Error> {
    let offered = frontend.get_features()?;
    let needed = shape.features();
    if offered & needed != needed {
        return Err(format!("features {offered:#x} lack {:#x}", needed & !offered).into());
    }
    let features = needed | offered & FLUSH;
    let known =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
    let common = frontend.get_protocol_features()? & (known | more);
    if !common.contains(more) {
        return Err(format!("the protocol features lack {:?}", more - common).into());
    }
    frontend.set_protocol_features(common)?;
    if common.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_features(features)?;
    let queues = if common.contains(VhostUserProtocolFeatures::MQ) { frontend.get_queue_num()? } else { 1 };
    if queues < shape.queues as u64 {
        return Err(format!("{queues} virtqueues offered, {} wanted", shape.queues).into());
    }
    Ok(features)
}

/// `capacity`, the first field of the configuration space (virtio 1.2 §5.2.4).
fn capacity(frontend: &mut Frontend) -> Result<u64, Error> {
    let (_, bytes) = frontend.get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8])?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
}
