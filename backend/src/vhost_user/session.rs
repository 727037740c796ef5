//! The session with one front-end. The codec decodes a message and calls one method here, whose result becomes the
//! acknowledgement. So a method returns `Ok` only after the work is done, and an `Err` leaves the state unchanged.
//!
//! The reason of a refusal is logged here, because the protocol cannot carry it.

mod descriptor;
mod dirty_log;
mod handed_over;
mod inflight;
mod memory;
mod negotiation;
mod rings;
mod succession;
mod vmm;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Instant;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{GpuBackend, VhostUserBackendReqHandlerMut};

use super::backend_channel::BackendChannel;
use super::dirty_log::LogSetup;
use super::features::{ProtocolFeatures, VirtioFeatures};
use super::guest_memory::GuestMemory;
use super::inflight::InflightRegions;
use super::logs::Logs;
use super::vring::{Addresses, Vring};
use super::{Device, Error, config};
use crate::addr::{Gpa, Qva};
use crate::kvm::{DiscardMonitor, ShimLink};
use crate::memory::MemTable;
use crate::socket::Peer;
pub(super) use descriptor::event_fd;

/// The codec's result. Its error says only that the message failed; the reason is in [`Session::refusal`].
type HandlerResult<T> = vhost::vhost_user::Result<T>;

/// Refused messages per session. Each is logged, and a front-end that sends nothing else must not fill the log.
const MAX_REFUSALS: u32 = 64;

/// The state of one session.
pub(super) struct Session<'d> {
    device: &'d Device,
    logs: &'d Logs,
    peer: Peer,
    offered: VirtioFeatures,
    features: Option<VirtioFeatures>,
    /// GET_FEATURES came; the last SET_FEATURES, even before a reset: the codec keeps both.
    negotiation: (bool, Option<u64>),
    protocol: ProtocolFeatures,
    status: u64,
    memory: GuestMemory<'d>,
    /// For the rings that start from now on.
    inflight: Option<InflightRegions<'d>>,
    log: LogSetup,
    /// The engine marks pages.
    is_logging: bool,
    rings: Vec<Vring>,
    /// No other front-end is served, so rings may run. See `succession.rs`.
    is_served: bool,
    /// When the last ring that ran has stopped.
    stopped_at: Option<Instant>,
    /// The negotiated features have been logged.
    features_logged: bool,
    channel: Option<BackendChannel>,
    shim: ShimLink<'d>,
    discards: DiscardMonitor,
    /// The reason why the last message was refused, until [`Self::take_refusal`].
    refusal: Option<Error>,
    refusals: u32,
}

impl<'d> Session<'d> {
    pub(super) fn new(device: &'d Device, logs: &'d Logs, peer: Peer) -> Self {
        let shim = ShimLink::new(&device.vmm, peer.pid());
        Self {
            device,
            logs,
            peer,
            offered: VirtioFeatures::offered(&device.engine.geometry()) - device.withheld,
            features: None,
            negotiation: (false, None),
            protocol: ProtocolFeatures::empty(),
            status: 0,
            memory: GuestMemory::new(device, &logs.memory),
            inflight: None,
            log: LogSetup::default(),
            is_logging: false,
            rings: (0..usize::from(device.queues)).map(Vring::new).collect(),
            is_served: true,
            stopped_at: None,
            features_logged: false,
            channel: None,
            shim,
            discards: DiscardMonitor::default(),
            refusal: None,
            refusals: 0,
        }
    }

    /// The memory that the front-end shares.
    pub(super) fn memory(&self) -> &MemTable {
        self.memory.table()
    }

    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The negotiated protocol features.
    pub(super) fn protocol(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// Takes the reason why the last message was refused, if it was.
    pub(super) fn take_refusal(&mut self) -> Option<Error> {
        self.refusal.take()
    }

    /// GET_STATUS.
    pub(super) fn status(&self) -> u64 {
        self.status
    }

    /// SET_STATUS. Zero is a reset by the driver (virtio 1.2 §2.1.2). Memory stays mapped.
    pub(super) fn set_status(&mut self, status: u64) -> Result<(), Error> {
        self.status = status;
        if status == 0 { self.reset() } else { Ok(()) }
    }

    /// SET_BACKEND_REQ_FD.
    pub(super) fn set_channel(&mut self, socket: OwnedFd) -> Result<(), Error> {
        self.channel = Some(BackendChannel::new(socket)?);
        Ok(())
    }

    /// Notifies the front-end of a change of the configuration space, if it has set up a channel for that.
    pub(super) fn config_changed(&mut self) {
        if self.protocol.contains(ProtocolFeatures::CONFIG)
            && self.channel.as_ref().is_some_and(|channel| !channel.config_changed())
        {
            self.channel = None;
        }
    }

    /// Stops the vrings, unmaps all memory and unregisters from KVM. Each step is done even if another fails.
    ///
    /// # Errors
    /// The data path has failed, so no other front-end can be served either.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        let stopped = self.reset();
        let released = self.memory.release();
        self.discards = DiscardMonitor::default();
        self.shim.unregister();
        released.and(stopped)
    }

    /// Restores the state after connecting, except for memory and event descriptors.
    fn reset(&mut self) -> Result<(), Error> {
        self.status = 0;
        self.features = None;
        self.inflight = None;
        let engine = &self.device.engine;
        self.stopping_rings(|session| session.rings.iter_mut().map(|ring| ring.reset(engine)).fold(Ok(()), Result::and))
    }

    /// Logs and counts a refusal. Returns its reason, or [`Error::TooManyRefusals`].
    pub(super) fn count_refusal(&mut self, error: Error) -> Error {
        self.logs.refusals.error(|| format!("refused: {error}"));
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS { Error::TooManyRefusals(self.refusals) } else { error }
    }

    /// Converts the result of a message to the codec's, and keeps the reason of a refusal.
    fn answer<T>(&mut self, result: Result<T, Error>) -> HandlerResult<T> {
        result.map_err(|error| {
            self.refusal = Some(self.count_refusal(error));
            vhost::vhost_user::Error::ReqHandlerError(std::io::Error::from(std::io::ErrorKind::InvalidInput))
        })
    }

    fn not_implemented<T>(&mut self, message: &'static str) -> HandlerResult<T> {
        self.answer(Err(Error::NotImplemented(message)))
    }
}

impl VhostUserBackendReqHandlerMut for Session<'_> {
    fn set_owner(&mut self) -> HandlerResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> HandlerResult<()> {
        let result = self.reset();
        self.answer(result)
    }

    fn reset_device(&mut self) -> HandlerResult<()> {
        let result = self.reset();
        self.answer(result)
    }

    fn get_features(&mut self) -> HandlerResult<u64> {
        self.negotiation.0 = true;
        Ok(self.offered.bits())
    }

    fn set_features(&mut self, features: u64) -> HandlerResult<()> {
        let result = self.accept_features(features);
        self.answer(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> HandlerResult<Option<Vec<u64>>> {
        let result = self.replace_memory(regions, files);
        self.answer(result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> HandlerResult<()> {
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
        log: u64,
    ) -> HandlerResult<()> {
        let addresses = Addresses { desc: Qva(descriptor), avail: Qva(available), used: Qva(used) };
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(Gpa(log));
        let result = self.set_ring_addresses(index, addresses, used_log);
        self.answer(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> HandlerResult<()> {
        let layout = self.layout();
        let result = self.set_up_ring(index, |ring| ring.set_base(base, layout));
        self.answer(result)
    }

    fn get_vring_base(&mut self, index: u32) -> HandlerResult<VhostUserVringState> {
        let base = self.stop_ring(index);
        self.answer(base).map(|base| VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let engine = &self.device.engine;
        let result = event_fd("SET_VRING_KICK", fd)
            .and_then(|fd| self.set_up_ring(index.into(), |ring| ring.set_kick(engine, fd)));
        self.answer(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let engine = &self.device.engine;
        let result = event_fd("SET_VRING_CALL", fd).and_then(|fd| self.ring(index.into())?.set_call(engine, fd));
        self.answer(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> HandlerResult<()> {
        let engine = &self.device.engine;
        let result = event_fd("SET_VRING_ERR", fd).and_then(|fd| self.ring(index.into())?.set_err(engine, fd));
        self.answer(result)
    }

    fn get_protocol_features(&mut self) -> HandlerResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_retain(ProtocolFeatures::all().bits()))
    }

    fn set_protocol_features(&mut self, features: u64) -> HandlerResult<()> {
        let result = self.accept_protocol(features);
        self.answer(result)
    }

    fn get_queue_num(&mut self) -> HandlerResult<u64> {
        Ok(self.device.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> HandlerResult<()> {
        let engine = &self.device.engine;
        let result = self.set_up_ring(index, |ring| {
            ring.set_enabled(engine, enable);
            Ok(())
        });
        self.answer(result)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> HandlerResult<Vec<u8>> {
        let result = config::read(self.device, offset as usize, size as usize);
        self.answer(result)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> HandlerResult<()> {
        let result = self.require_served("SET_CONFIG").and_then(|()| config::write(&self.device.engine, offset, bytes));
        self.answer(result)
    }

    fn get_max_mem_slots(&mut self) -> HandlerResult<u64> {
        Ok(super::error::MAX_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> HandlerResult<Option<u64>> {
        let result = self.add_memory(region, file);
        self.answer(result).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> HandlerResult<()> {
        let result = self.remove_memory(region);
        self.answer(result)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> HandlerResult<()> {
        self.not_implemented("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> HandlerResult<File> {
        self.not_implemented("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> HandlerResult<(VhostUserInflight, File)> {
        let result = self.make_inflight(inflight);
        self.answer(result)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> HandlerResult<()> {
        let result = self.accept_inflight(inflight, file);
        self.answer(result)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> HandlerResult<Option<File>> {
        self.not_implemented("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> HandlerResult<()> {
        self.not_implemented("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> HandlerResult<VhostUserShMemConfig> {
        self.not_implemented("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> HandlerResult<()> {
        let result = self.set_log(log, file);
        self.answer(result)
    }
}
