//! A virtual machine that survives the death of its server: memory, rings and the in-flight region stay, connections come and
//! go. It does what QEMU does with a reconnecting character device, and nothing more: no request is submitted again, and no kick
//! tells the new server of those that are in the rings already.

mod log;
mod next;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::ram::Ram;
use super::{ANSWER_LIMIT, Error, Ring, Shape, negotiate, ring};

pub use log::Copy;
pub use next::{NextFrontEnd, NextMemory};

/// What the virtual machine does about its requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// It negotiates `INFLIGHT_SHMFD`, asks for a region once and hands it in at each start.
    Kept,
    /// It does not know of regions.
    None,
}

/// The in-flight region as the server described it.
struct Inflight {
    size: u64,
    offset: u64,
    file: File,
}

/// Guest memory and rings, with or without a server.
pub struct Guest {
    /// The virtqueues.
    pub rings: Vec<Ring>,
    ram: Ram,
    shape: Shape,
    policy: Region,
    /// The virtio features of the last session.
    features: u64,
    inflight: Option<Inflight>,
    /// The server marks dirty pages.
    logged: bool,
    link: Option<(Frontend, UnixStream)>,
    /// The rings' calls and the end of the connection.
    wake: Epoll,
}

impl Guest {
    /// New memory with empty rings, not connected.
    ///
    /// # Errors
    /// The memory cannot be allocated.
    pub fn new(shape: Shape, policy: Region) -> Result<Self, Error> {
        let ram = Ram::new(shape.queues * ring::bytes_needed(shape))?;
        let rings = Self::rings(&ram, shape)?;
        let wake = wake(&rings)?;
        Ok(Self { rings, ram, shape, policy, features: 0, inflight: None, logged: false, link: None, wake })
    }

    fn rings(ram: &Ram, shape: Shape) -> Result<Vec<Ring>, Error> {
        (0..shape.queues).map(|index| Ring::new(ram, index, shape, shape.features())).collect()
    }

    /// Sets up a session over a connected socket and starts the rings where they are.
    ///
    /// # Errors
    /// What the server refused, or that it died.
    pub fn connect(&mut self, socket: UnixStream) -> Result<(), Error> {
        self.link = None;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut frontend = Frontend::from_stream(socket.try_clone()?, self.shape.queues as u64);
        frontend.set_owner()?;
        self.features = negotiate(&mut frontend, self.shape, self.protocol_features())?;
        self.start(frontend, socket)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let always = VhostUserProtocolFeatures::RESET_DEVICE | VhostUserProtocolFeatures::LOG_SHMFD;
        match self.policy {
            Region::Kept => VhostUserProtocolFeatures::INFLIGHT_SHMFD | always,
            Region::None => always,
        }
    }

    /// Hands in region and memory, and starts the rings where they are.
    fn start(&mut self, mut frontend: Frontend, socket: UnixStream) -> Result<(), Error> {
        if self.policy == Region::Kept {
            // It depends on them. QEMU sets them once more when it starts the device.
            frontend.set_features(self.features)?;
            self.hand_in(&mut frontend)?;
        }
        frontend.set_features(self.features | if self.logged { log::LOG_ALL } else { 0 })?;
        frontend.set_mem_table(&[self.ram.region()])?;
        for (index, ring) in self.rings.iter().enumerate() {
            ring.describe(&frontend, index)?;
            ring.address(&frontend, index, self.logged)?;
            send_base(&socket, index, ring.base())?;
            ring.run(&mut frontend, index)?;
        }
        self.watch(&socket)?;
        self.link = Some((frontend, socket));
        Ok(())
    }

    /// Wakes the guest up when the server closes `socket`. A closed descriptor leaves the set by itself.
    fn watch(&self, socket: &UnixStream) -> Result<(), Error> {
        self.wake.ctl(ControlOperation::Add, socket.as_raw_fd(), EpollEvent::new(EventSet::READ_HANG_UP, 0))?;
        Ok(())
    }

    /// Asks for the region if there is none yet, then hands it in.
    fn hand_in(&mut self, frontend: &mut Frontend) -> Result<(), Error> {
        let (queues, size) = (u16::try_from(self.shape.queues)?, self.rings[0].size());
        if self.inflight.is_none() {
            let (answer, file) = frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))?;
            self.inflight = Some(Inflight { size: answer.mmap_size, offset: answer.mmap_offset, file });
        }
        let Some(Inflight { size: bytes, offset, file }) = &self.inflight else { unreachable!("it was just set") };
        frontend.set_inflight_fd(&VhostUserInflight::new(*bytes, *offset, queues, size), file.as_raw_fd())?;
        Ok(())
    }

    /// Closes the connection, as the end of the front-end's process does.
    pub fn disconnect(&mut self) {
        self.link = None;
    }

    /// True if the server has closed the connection, or there is none.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let Some((_, socket)) = &self.link else { return true };
        let mut found = [PollFd::new(socket, PollFlags::RDHUP)];
        poll(&mut found, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Sleeps until a ring is called, the server dies, or `limit` is over; false in the last case. Before,
    /// [`Ring::try_reap`] must find nothing after [`Ring::expect_call`], on each ring.
    ///
    /// # Errors
    /// Those of `epoll_wait`.
    pub fn sleep(&self, limit: Duration) -> Result<bool, Error> {
        // Rounded up, because 0 ms would not wait.
        let milliseconds = i32::try_from(limit.as_millis() + 1)?;
        let woken = match self.wake.wait(milliseconds, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
            woken => woken.is_ok_and(|count| count > 0),
        };
        self.rings.iter().for_each(|ring| drop(ring.call().read()));
        Ok(woken)
    }

    /// Stops all rings with `GET_VRING_BASE`, which waits for the requests in flight.
    ///
    /// # Errors
    /// What the server answered, or that there is none.
    pub fn stop(&self) -> Result<(), Error> {
        let (frontend, _) = self.link.as_ref().ok_or("not connected")?;
        (0..self.rings.len()).try_for_each(|index| frontend.get_vring_base(index).map(drop))?;
        Ok(())
    }

    /// Starts the rings again where [`Self::stop`] has stopped them, over the same connection: QEMU's `cont`.
    ///
    /// # Errors
    /// What the server refused, or that there is none.
    pub fn start_again(&mut self) -> Result<(), Error> {
        let (frontend, _) = self.link.as_mut().ok_or("not connected")?;
        self.rings.iter().enumerate().try_for_each(|(index, ring)| ring.run(frontend, index))
    }

    /// The guest resets the device over the connection that it has, and starts it again. Its rings are empty and all of its memory
    /// is zero. Call [`Self::stop`] before.
    ///
    /// # Errors
    /// What the server refused, or that there is none.
    pub fn reset_and_start(&mut self) -> Result<(), Error> {
        let (mut frontend, socket) = self.link.take().ok_or("not connected")?;
        frontend.reset_device()?;
        self.reset()?;
        self.start(frontend, socket)
    }

    /// The guest resets the device while no server is there. Its front-end keeps the region, which QEMU does not.
    ///
    /// # Errors
    /// The rings' eventfds cannot be created.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.ram.clear();
        self.rings = Self::rings(&self.ram, self.shape)?;
        self.wake = wake(&self.rings)?;
        Ok(())
    }

    /// The front-end drops the region, as QEMU does when the guest resets the device.
    pub fn drop_region(&mut self) {
        self.inflight = None;
    }
}

fn wake(rings: &[Ring]) -> Result<Epoll, Error> {
    let wake = Epoll::new()?;
    for ring in rings {
        wake.ctl(ControlOperation::Add, ring.call().as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
    }
    Ok(wake)
}

/// `SET_VRING_BASE` without a reply. The crate's message has no room for the positions of a packed ring.
fn send_base(mut socket: &UnixStream, index: usize, base: u32) -> Result<(), Error> {
    const SET_VRING_BASE: u32 = 10;
    const VERSION: u32 = 1;
    let words = [SET_VRING_BASE, VERSION, 8, u32::try_from(index)?, base];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    socket.write_all(&bytes)?;
    Ok(())
}
