//! A vhost-user-blk client: the front-end's half of the conversation, held by the `vhost` crate, and the guest's half of
//! the rings, written here and sharing no code with the server under test.
//!
//! All rings lie in one memory file; a request has a slot with a fixed place for its header, its data and its status. So
//! nothing is allocated once a client is connected, and a load can be measured without measuring the client.

mod ring;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{FileOffset, MmapRegion};

pub use ring::{Done, Request, Ring};

/// Where the guest believes its memory to start.
const GUEST_BASE: u64 = 1 << 20;
/// How long an answer to a message may take; a server that hangs fails the test rather than hang it.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// VIRTIO_RING_F_INDIRECT_DESC and VIRTIO_RING_F_EVENT_IDX (virtio 1.2 §6).
const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// VIRTIO_BLK_F_FLUSH (virtio 1.2 §5.2.3): without it each write must be durable before it ends.
const FLUSH: u64 = 1 << 9;

/// What to ask a server for.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Virtqueues to use.
    pub queues: usize,
    /// Requests in flight on each, at most 256.
    pub depth: u16,
    /// Largest request, bytes; a multiple of 4096.
    pub bytes: usize,
    /// Use indirect descriptors, if they are offered.
    pub indirect: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self { queues: 1, depth: 16, bytes: 64 << 10, indirect: true }
    }
}

/// Why there is no client.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A connected front-end with a guest that has its rings running.
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
    /// The socket's, or what the server refused.
    pub fn connect(path: &Path, shape: Shape) -> Result<Self, Error> {
        Self::new(UnixStream::connect(path)?, shape)
    }

    /// Speaks over a connected socket: features, memory, rings.
    ///
    /// # Errors
    /// What the server refused.
    pub fn new(socket: UnixStream, shape: Shape) -> Result<Self, Error> {
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut frontend = Frontend::from_stream(socket, shape.queues as u64);
        frontend.set_owner()?;
        let features = negotiate(&mut frontend, shape)?;
        let memory = share_memory(&frontend, shape.queues * ring::bytes_needed(shape))?;
        let mut rings = Vec::new();
        for index in 0..shape.queues {
            let ring = Ring::new(&memory, index, shape, features)?;
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

    /// Reads as many bytes as fit from `sector` and waits.
    ///
    /// # Errors
    /// As for [`Self::write`].
    pub fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let slot = self.rings[0].submit(Request::Read { sector, bytes: bytes.len() });
        // What an earlier request left there must not pass for what this one reads.
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
            Some(Done { slot, status: 0 }) => Ok(slot),
            Some(Done { status, .. }) => Err(format!("the request ended with status {status}").into()),
            None => Err("the request did not end".into()),
        }
    }
}

/// Agrees on features; those of virtio that both know.
fn negotiate(frontend: &mut Frontend, shape: Shape) -> Result<u64, Error> {
    let offered = frontend.get_features()?;
    let wanted = VERSION_1 | FLUSH | EVENT_IDX | if shape.indirect { INDIRECT } else { 0 };
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let features = offered & (wanted | protocol);
    if features & (VERSION_1 | protocol) != VERSION_1 | protocol {
        return Err(format!("features {offered:#x} lack VERSION_1 or PROTOCOL_FEATURES").into());
    }
    let known =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
    let common = frontend.get_protocol_features()? & known;
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

fn share_memory(frontend: &Frontend, bytes: usize) -> Result<Arc<MmapRegion>, Error> {
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, bytes as u64)?;
    let handle = file.as_raw_fd();
    let memory = MmapRegion::from_file(FileOffset::new(file, 0), bytes)?;
    frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST_BASE,
        memory_size: bytes as u64,
        userspace_addr: memory.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: handle,
    }])?;
    Ok(Arc::new(memory))
}

/// `capacity`, the first field of the configuration space (virtio 1.2 §5.2.4).
fn capacity(frontend: &mut Frontend) -> Result<u64, Error> {
    let (_, bytes) = frontend.get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8])?;
    Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
}
