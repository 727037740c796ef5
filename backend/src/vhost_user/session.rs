//! One conversation with one front-end: what each message means. The codec decodes a message and calls one method here; the
//! method does the work, and its result becomes the acknowledgement. So an `Ok` must not be returned before the work is
//! done, and an `Err` leaves everything as it was.
//!
//! A refusal is logged here, with its reason, because the wire carries none.

mod memory;
mod vmm;

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::io::{FdFlags, fcntl_setfd};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{GpuBackend, VhostUserBackendReqHandlerMut};

use super::backend_channel::BackendChannel;
use super::features::{ACCESS_PLATFORM, Names, ProtocolFeatures, VirtioFeatures};
use super::guest_memory::GuestMemory;
use super::vring::{Addresses, Ring, VringContext};
use super::{Device, Error, config};
use crate::addr::Qva;
use crate::engine::Layout;
use crate::kvm::{DiscardMonitor, ShimLink};
use crate::socket::Peer;

/// The codec's result; its error only says *that* something failed, the reason stays in [`Session::refusal`].
type Answer<T> = vhost::vhost_user::Result<T>;

/// How many refusals a front-end may collect. One that makes mistakes gets them all explained; one that does nothing else
/// must not fill the log.
const MAX_REFUSALS: u32 = 64;

/// The state of one conversation.
pub(super) struct Session<'d> {
    device: &'d Device,
    peer: Peer,
    offered: VirtioFeatures,
    features: Option<VirtioFeatures>,
    protocol: ProtocolFeatures,
    status: u64,
    memory: GuestMemory<'d>,
    rings: Vec<Ring>,
    announced: bool,
    channel: Option<BackendChannel>,
    link: ShimLink<'d>,
    watch: DiscardMonitor,
    refusal: Option<Error>,
    refusals: u32,
}

impl<'d> Session<'d> {
    pub(super) fn new(device: &'d Device, peer: Peer) -> Self {
        let link = ShimLink::new(&device.vmm, peer.pid());
        Self {
            device,
            peer,
            offered: VirtioFeatures::offered(&device.engine.geometry()),
            features: None,
            protocol: ProtocolFeatures::empty(),
            status: 0,
            memory: GuestMemory::new(&device.engine, &*device.space),
            rings: (0..usize::from(device.queues)).map(Ring::new).collect(),
            announced: false,
            channel: None,
            link,
            watch: DiscardMonitor::default(),
            refusal: None,
            refusals: 0,
        }
    }

    /// Who this is.
    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The protocol features that both sides agreed on.
    pub(super) fn protocol(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// Why the last message was refused, if it was; asked once.
    pub(super) fn take_refusal(&mut self) -> Option<Error> {
        self.refusal.take()
    }

    /// GET_STATUS.
    pub(super) fn status(&self) -> u64 {
        self.status
    }

    /// SET_STATUS. Zero is the guest's reset (virtio 1.2 §2.1.2); memory stays.
    pub(super) fn set_status(&mut self, status: u64) -> Result<(), Error> {
        self.status = status;
        if status == 0 { self.reset() } else { Ok(()) }
    }

    /// SET_BACKEND_REQ_FD.
    pub(super) fn set_channel(&mut self, socket: OwnedFd) -> Result<(), Error> {
        self.channel = Some(BackendChannel::new(socket)?);
        Ok(())
    }

    /// The disk is not what it was when the front-end read the configuration space: tells it, if it listens.
    pub(super) fn config_changed(&mut self) {
        if self.protocol.contains(ProtocolFeatures::CONFIG)
            && self.channel.as_ref().is_some_and(|it| !it.config_changed())
        {
            self.channel = None;
        }
    }

    /// Stops the rings, gives all memory back and takes leave of the VM's process, whatever happens on the way.
    ///
    /// # Errors
    /// The data path is broken, so no other front-end can be served either.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        let stopped = self.reset();
        let released = self.memory.release();
        self.watch = DiscardMonitor::default();
        self.link.unregister();
        released.and(stopped)
    }

    /// Back to the state after connecting, but for memory and event descriptors.
    fn reset(&mut self) -> Result<(), Error> {
        self.status = 0;
        self.features = None;
        let engine = &self.device.engine;
        self.rings.iter_mut().map(|ring| ring.reset(engine)).fold(Ok(()), Result::and)
    }

    /// Logs and counts a refusal; gives its reason back, or that there have been too many.
    pub(super) fn refused(&mut self, error: Error) -> Error {
        log::error!("refused: {error}");
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS { Error::TooManyRefusals(self.refusals) } else { error }
    }

    /// Turns the outcome of a message into the codec's, and keeps the reason of a refusal.
    fn answer<T>(&mut self, result: Result<T, Error>) -> Answer<T> {
        result.map_err(|error| {
            self.refusal = Some(self.refused(error));
            vhost::vhost_user::Error::ReqHandlerError(std::io::Error::from(std::io::ErrorKind::InvalidInput))
        })
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring, Error> {
        let queues = self.device.queues;
        let position = usize::try_from(index).ok();
        position.and_then(|index| self.rings.get_mut(index)).ok_or(Error::NoSuchRing { index, queues })
    }

    /// Applies a message to a ring, and starts the ring if that was what it waited for.
    fn set_up_ring(&mut self, index: u32, change: impl FnOnce(&mut Ring) -> Result<(), Error>) -> Result<(), Error> {
        change(self.ring(index)?)?;
        let around = VringContext { engine: &self.device.engine, table: self.memory.table(), features: self.features };
        let position = usize::try_from(index).expect("an index that was just used");
        if self.rings[position].start(around)? && !std::mem::replace(&mut self.announced, true) {
            let (virtio, protocol) = (Names(self.features.unwrap_or_default()), Names(self.protocol));
            log::info!("{}: virtio {virtio}; protocol {protocol}", self.peer);
        }
        Ok(())
    }

    /// Starts every ring that has now what it waited for.
    fn resume_rings(&mut self) {
        let around = VringContext { engine: &self.device.engine, table: self.memory.table(), features: self.features };
        for ring in &mut self.rings {
            // Still not there: the front-end learns it when it enables or kicks the ring.
            if let Err(error) = ring.start(around) {
                log::debug!("{error}");
            }
        }
    }

    fn accept_features(&mut self, raw: u64) -> Result<(), Error> {
        let acked = VirtioFeatures::from_bits_retain(raw);
        if raw & ACCESS_PLATFORM != 0 {
            return Err(Error::AccessPlatform);
        }
        let unknown = VirtioFeatures::from_bits_retain(raw & !self.offered.bits());
        if !unknown.is_empty() {
            return Err(Error::NotOffered { what: "SET_FEATURES", names: Names(unknown).to_string() });
        }
        self.features = Some(acked);
        config::follow(&self.device.engine, acked);
        self.resume_rings();
        Ok(())
    }

    fn accept_protocol(&mut self, raw: u64) -> Result<(), Error> {
        let unknown = ProtocolFeatures::from_bits_retain(raw & !ProtocolFeatures::all().bits());
        if !unknown.is_empty() {
            return Err(Error::NotOffered { what: "SET_PROTOCOL_FEATURES", names: Names(unknown).to_string() });
        }
        self.protocol = ProtocolFeatures::from_bits_retain(raw);
        Ok(())
    }

    /// How rings lie in memory, once that has been agreed on.
    fn layout(&self) -> Option<Layout> {
        self.features.map(VirtioFeatures::layout)
    }

    fn refuse<T>(&mut self, message: &'static str) -> Answer<T> {
        self.answer(Err(Error::NotImplemented(message)))
    }
}

/// The codec receives descriptors without close-on-exec.
fn keep_from_children(file: File) -> Result<File, Error> {
    fcntl_setfd(&file, FdFlags::CLOEXEC).map_err(Error::system("set close-on-exec"))?;
    Ok(file)
}

fn event(file: Option<File>) -> Result<Option<OwnedFd>, Error> {
    file.map(|file| keep_from_children(file).map(OwnedFd::from)).transpose()
}

impl VhostUserBackendReqHandlerMut for Session<'_> {
    fn set_owner(&mut self) -> Answer<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Answer<()> {
        let result = self.reset();
        self.answer(result)
    }

    fn reset_device(&mut self) -> Answer<()> {
        let result = self.reset();
        self.answer(result)
    }

    fn get_features(&mut self) -> Answer<u64> {
        Ok(self.offered.bits())
    }

    fn set_features(&mut self, features: u64) -> Answer<()> {
        let result = self.accept_features(features);
        self.answer(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Answer<Option<Vec<u64>>> {
        let result = self.replace_memory(regions, files);
        self.answer(result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Answer<()> {
        let layout = self.layout();
        let result = self.set_up_ring(index, |ring| ring.set_size(num, layout));
        self.answer(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Answer<()> {
        let addresses = Addresses { desc: Qva(descriptor), avail: Qva(available), used: Qva(used) };
        let logging = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let result = self.set_up_ring(index, |ring| ring.set_addresses(addresses, logging));
        self.answer(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Answer<()> {
        let layout = self.layout();
        let result = self.set_up_ring(index, |ring| ring.set_base(base, layout));
        self.answer(result)
    }

    fn get_vring_base(&mut self, index: u32) -> Answer<VhostUserVringState> {
        let engine = &self.device.engine;
        let first = self.layout().unwrap_or(Layout::Split).first_base();
        let base = self.ring(index).and_then(|ring| ring.stop(engine));
        self.answer(base).map(|base| VhostUserVringState::new(index, base.unwrap_or(first)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let engine = &self.device.engine;
        let result = event(fd).and_then(|fd| self.set_up_ring(index.into(), |ring| ring.set_kick(engine, fd)));
        self.answer(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let engine = &self.device.engine;
        let result = event(fd).and_then(|fd| self.ring(index.into())?.set_call(engine, fd));
        self.answer(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Answer<()> {
        let engine = &self.device.engine;
        let result = event(fd).and_then(|fd| self.ring(index.into())?.set_err(engine, fd));
        self.answer(result)
    }

    fn get_protocol_features(&mut self) -> Answer<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_retain(ProtocolFeatures::all().bits()))
    }

    fn set_protocol_features(&mut self, features: u64) -> Answer<()> {
        let result = self.accept_protocol(features);
        self.answer(result)
    }

    fn get_queue_num(&mut self) -> Answer<u64> {
        Ok(self.device.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Answer<()> {
        let engine = &self.device.engine;
        let result = self.set_up_ring(index, |ring| {
            ring.set_enabled(engine, enable);
            Ok(())
        });
        self.answer(result)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Answer<Vec<u8>> {
        Ok(config::read(self.device, offset as usize, size as usize))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Answer<()> {
        let result = config::write(&self.device.engine, offset, bytes);
        self.answer(result)
    }

    fn get_max_mem_slots(&mut self) -> Answer<u64> {
        Ok(super::error::MAX_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Answer<Option<u64>> {
        let result = self.add_memory(region, file);
        self.answer(result).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Answer<()> {
        let result = self.remove_memory(region);
        self.answer(result)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Answer<()> {
        self.refuse("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Answer<File> {
        self.refuse("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Answer<(VhostUserInflight, File)> {
        self.refuse("GET_INFLIGHT_FD")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Answer<()> {
        self.refuse("SET_INFLIGHT_FD")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Answer<Option<File>> {
        self.refuse("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Answer<()> {
        self.refuse("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Answer<VhostUserShMemConfig> {
        self.refuse("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Answer<()> {
        self.refuse("SET_LOG_BASE")
    }
}
