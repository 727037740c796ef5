//! The state of one vring as the front-end sets it up (vhost-user: "Ring states"). Each state is a type that holds exactly
//! what is known in that state, so a running vring always has all its parts.
//!
//! ```text
//!          NUM ADDR BASE KICK, in any order          enabled, and all of it in shared memory
//!  Setup ────────────────────────────────▶ Complete ────────────────────────────────▶ Running
//!    ▲    with the last of NUM ADDR KICK       ▲                                       │ │
//!    │                                         └───────────────────────────────────────┘ │
//!    │                                           suspended: its memory is removed        │
//!    └───────────────────────────────────────────────────────────────────────────────────┘
//!                                        GET_VRING_BASE, reset, disconnect
//! ```
//!
//! A vring starts only once it is enabled, so no request is taken before the front-end has finished the setup. Disabling a
//! running vring pauses it; it stays in `Running`. The call and error descriptors are kept in every state, because QEMU
//! sends them before the first reset and does not send the error descriptor again at a restart.

mod dirty_log;
mod handed_over;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::Error;
use super::features::VirtioFeatures;
use super::inflight::InflightRegions;
use crate::addr::{Address, Gpa, Qva, Span};
use crate::engine::virtqueue::Area;
use crate::engine::{Engine, Layout, Stopped, VringSetup};
use crate::memory::{DirtyLog, MemTable};
use crate::rate_limited_log::SharedLog;

/// The addresses of the three parts of a vring. In a packed ring, `avail` is the driver's event suppression structure and
/// `used` the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) desc: Qva,
    pub(super) avail: Qva,
    pub(super) used: Qva,
}

/// How the driver signals new requests. `Polled` is a SET_VRING_KICK without a descriptor.
enum Kick {
    Event(OwnedFd),
    Polled,
}

impl Kick {
    fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Event(fd) => fd.try_clone().map(Some),
            Self::Polled => Ok(None),
        }
    }
}

/// Some parts may be missing.
#[derive(Default)]
struct Setup {
    size: Option<u16>,
    addresses: Option<Addresses>,
    base: Option<u32>,
    kick: Option<Kick>,
}

/// All parts are known.
struct Complete {
    size: u16,
    addresses: Addresses,
    /// `None`: the initial state of a vring.
    base: Option<u32>,
    kick: Kick,
}

/// The engine serves the vring.
struct Running {
    complete: Complete,
    areas: [Span<Gpa>; 3],
}

enum State {
    Setup(Setup),
    Complete(Complete),
    Running(Running),
}

impl Default for State {
    fn default() -> Self {
        Self::Setup(Setup::default())
    }
}

impl Setup {
    /// `Complete` if all parts are known.
    fn into_state(self) -> State {
        match self {
            Self { size: Some(size), addresses: Some(addresses), base, kick: Some(kick) } => {
                State::Complete(Complete { size, addresses, base, kick })
            }
            incomplete => State::Setup(incomplete),
        }
    }
}

impl Complete {
    fn into_setup(self) -> Setup {
        Setup { size: Some(self.size), addresses: Some(self.addresses), base: self.base, kick: Some(self.kick) }
    }

    /// Finds the three parts in guest memory. Room for the event indices is required even if they are not negotiated.
    fn areas(&self, index: usize, layout: Layout, table: &MemTable) -> Result<[Span<Gpa>; 3], Error> {
        if table.is_empty() {
            return Err(Error::NoMemory { index });
        }
        let find = |area: Area, address: Qva| {
            let Area { name: part, bytes: len, alignment } = area;
            let outside = || Error::RingOutside { index, part, address, len, regions: table.to_string() };
            let area = table.gpa(address, len).ok_or_else(outside)?;
            let aligned = area.start().is_aligned(alignment);
            if aligned { Ok(area) } else { Err(Error::RingAlignment { index, part, address, alignment }) }
        };
        let [desc, driver, device] = layout.areas(self.size, true);
        let addresses = self.addresses;
        Ok([find(desc, addresses.desc)?, find(driver, addresses.avail)?, find(device, addresses.used)?])
    }
}

/// The state outside a vring on which its start depends.
#[derive(Clone, Copy)]
pub(super) struct VringContext<'a> {
    pub(super) engine: &'a Engine,
    pub(super) table: &'a MemTable,
    /// `None` if the front-end does not keep requests in flight over a crash.
    pub(super) inflight: Option<&'a InflightRegions<'a>>,
    /// The log of dirty pages, which is wanted if LOG_ALL is among the features.
    pub(super) log: Option<&'a DirtyLog>,
    /// `None` until SET_FEATURES, and again after a reset.
    pub(super) features: Option<VirtioFeatures>,
}

/// What becomes of requests in flight when a vring stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// They complete. Those that do not in time fail.
    Drain,
    /// They complete. Those that do not in time are left to the record of the vring.
    DrainOrSuspend,
    /// The same, after `limit`.
    Suspend { limit: Duration },
}

/// One virtqueue.
pub(super) struct Vring {
    index: usize,
    state: State,
    enabled: bool,
    /// The vring has been drained and its base returned, since it ran last. So the base of the next start is right, also of a
    /// packed ring that the guest has reset, and the record of its requests says nothing more.
    drained: bool,
    /// The vring has stopped with requests in flight, which its record has.
    suspended: bool,
    /// What the used ring is logged as (VHOST_VRING_F_LOG).
    used_log: Option<Gpa>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

impl Vring {
    pub(super) fn new(index: usize) -> Self {
        Self {
            index,
            state: State::default(),
            enabled: false,
            drained: false,
            suspended: false,
            used_log: None,
            call: None,
            err: None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// SET_VRING_NUM. Before features are known, any size that one of the layouts allows is accepted; `start` checks it
    /// again.
    pub(super) fn set_size(&mut self, size: u32, layout: Option<Layout>) -> Result<(), Error> {
        let layout = layout.unwrap_or(Layout::Packed);
        let valid = u16::try_from(size).ok().filter(|size| layout.allows(*size));
        let size = valid.ok_or(Error::RingSize { index: self.index, size, layout })?;
        if let State::Running(Running { complete, .. }) = &self.state
            && complete.size == size
        {
            return Ok(());
        }
        self.update("SET_VRING_NUM", |setup| setup.size = Some(size))
    }

    /// SET_VRING_ADDR. `start` checks the alignment, on the guest-physical address.
    pub(super) fn set_addresses(&mut self, addresses: Addresses) -> Result<(), Error> {
        if let State::Running(Running { complete, .. }) = &self.state
            && complete.addresses == addresses
        {
            return Ok(());
        }
        self.update("SET_VRING_ADDR", |setup| setup.addresses = Some(addresses))
    }

    /// SET_VRING_BASE. Which bases a packed ring allows depends on its size, so those are checked when the ring starts.
    pub(super) fn set_base(&mut self, base: u32, layout: Option<Layout>) -> Result<(), Error> {
        if layout == Some(Layout::Split) && u16::try_from(base).is_err() {
            return Err(Error::RingBase { index: self.index, base });
        }
        self.update("SET_VRING_BASE", |setup| setup.base = Some(base))
    }

    fn update(&mut self, request: &'static str, change: impl FnOnce(&mut Setup)) -> Result<(), Error> {
        let mut setup = match std::mem::take(&mut self.state) {
            State::Setup(setup) => setup,
            State::Complete(complete) => complete.into_setup(),
            running @ State::Running(_) => {
                self.state = running;
                return Err(Error::RingRuns { index: self.index, request });
            }
        };
        change(&mut setup);
        self.state = setup.into_state();
        Ok(())
    }

    /// SET_VRING_KICK. Without a descriptor the vring is polled.
    pub(super) fn set_kick(&mut self, engine: &Engine, fd: Option<OwnedFd>) -> Result<(), Error> {
        let kick = fd.map_or(Kick::Polled, Kick::Event);
        if let State::Running(Running { complete, .. }) = &mut self.state {
            engine.set_kick(self.index, kick.duplicate().map_err(Error::system("duplicate a kick descriptor"))?);
            complete.kick = kick;
            return Ok(());
        }
        self.update("SET_VRING_KICK", |setup| setup.kick = Some(kick))
    }

    /// SET_VRING_CALL. Without a descriptor the driver polls the used ring.
    pub(super) fn set_call(&mut self, engine: &Engine, fd: Option<OwnedFd>) -> Result<(), Error> {
        if self.is_running() {
            engine.set_call(self.index, duplicate(fd.as_ref())?);
        }
        self.call = fd;
        Ok(())
    }

    /// SET_VRING_ERR.
    pub(super) fn set_err(&mut self, engine: &Engine, fd: Option<OwnedFd>) -> Result<(), Error> {
        if self.is_running() {
            engine.set_err(self.index, duplicate(fd.as_ref())?);
        }
        self.err = fd;
        Ok(())
    }

    /// SET_VRING_ENABLE. QEMU also enables vrings that the guest does not use.
    pub(super) fn set_enabled(&mut self, engine: &Engine, enabled: bool) {
        self.enabled = enabled;
        if self.is_running() {
            engine.set_enabled(self.index, enabled);
        }
    }

    /// Starts the vring if it is complete and enabled; true if it has been started.
    ///
    /// # Errors
    /// The vring is complete but cannot run, for example because its memory is not shared. Its state does not change.
    pub(super) fn start(&mut self, context: VringContext<'_>) -> Result<bool, Error> {
        let State::Complete(complete) = &self.state else { return Ok(false) };
        let Some(features) = context.features else {
            return if self.enabled { Err(Error::NotNegotiated { index: self.index }) } else { Ok(false) };
        };
        if features.contains(VirtioFeatures::LOG_ALL) && context.log.is_none() {
            return Ok(false);
        }
        // Without the feature, vrings are enabled from the beginning. vhost-user: "Ring states"
        if !self.enabled && features.contains(VirtioFeatures::PROTOCOL_FEATURES) {
            return Ok(false);
        }
        let layout = features.layout();
        let areas = complete.areas(self.index, layout, context.table)?;
        let [desc, avail, used] = areas;
        if let Some(log) = context.log.filter(|_| features.contains(VirtioFeatures::LOG_ALL)) {
            self.check_log(log, Some(layout))?;
        }
        let inflight = context.inflight.and_then(|regions| regions.of(self.index, complete.size, layout));
        inflight.as_ref().filter(|_| self.drained).inspect(|record| record.retire());
        context.engine.start_ring(VringSetup {
            index: self.index,
            layout,
            size: complete.size,
            desc,
            avail,
            used,
            base: complete.base.unwrap_or(layout.first_base()),
            used_log: self.used_log,
            event_idx: features.contains(VirtioFeatures::EVENT_IDX),
            indirect: features.contains(VirtioFeatures::INDIRECT_DESC),
            kick: complete.kick.duplicate().map_err(Error::system("duplicate a kick descriptor"))?,
            call: duplicate(self.call.as_ref())?,
            err: duplicate(self.err.as_ref())?,
            inflight,
        })?;
        context.engine.set_enabled(self.index, true);
        if let State::Complete(complete) = std::mem::take(&mut self.state) {
            self.state = State::Running(Running { complete, areas });
            (self.drained, self.suspended) = (false, false);
        }
        Ok(true)
    }

    /// True if the vring is about to start as a packed one with both wrap counters 0, and was not stopped like that. In a new
    /// ring they are 1 (virtio 1.2 §2.8.1): what the driver makes available in it would not be seen.
    pub(super) fn is_doubtful(&self, layout: Option<Layout>) -> bool {
        let State::Complete(complete) = &self.state else { return false };
        layout == Some(Layout::Packed) && complete.base == Some(0) && !self.drained
    }

    /// True if the vring is complete, enabled and in `table`, and does not run.
    pub(super) fn could_start(&self, features: VirtioFeatures, table: &MemTable) -> bool {
        let State::Complete(complete) = &self.state else { return false };
        let enabled = self.enabled || !features.contains(VirtioFeatures::PROTOCOL_FEATURES);
        enabled && complete.areas(self.index, features.layout(), table).is_ok()
    }

    /// Drains and stops the vring if any part of it lies in `removed`. It stays complete, and starts again once its memory
    /// is back.
    pub(super) fn suspend(&mut self, engine: &Engine, removed: &[Span<Gpa>], log: &SharedLog) -> Result<(), Error> {
        let State::Running(Running { areas, .. }) = &self.state else { return Ok(()) };
        if !areas.iter().any(|area| removed.iter().any(|span| span.overlaps(area))) {
            return Ok(());
        }
        log.warn(|| format!("virtqueue {} is suspended: its memory is being removed", self.index));
        self.pause(engine)
    }

    /// GET_VRING_BASE: stops the vring, and returns its base. `None` if it has never run and no base was set. The next
    /// SET_VRING_KICK starts it again.
    pub(super) fn stop(&mut self, engine: &Engine, stop: Stop) -> Result<Option<u32>, Error> {
        let drained = |base| Stopped { base, left: 0 };
        let stopped = match stop {
            _ if !self.is_running() => Ok(None),
            Stop::Drain => engine.stop_ring(self.index).map(|base| base.map(drained)),
            Stop::DrainOrSuspend => engine.stop_or_suspend_ring(self.index),
            Stop::Suspend { limit } => engine.suspend_ring(self.index, limit),
        };
        let mut setup = match std::mem::take(&mut self.state) {
            State::Setup(setup) => setup,
            State::Complete(complete) | State::Running(Running { complete, .. }) => complete.into_setup(),
        };
        setup.kick = None;
        if let Ok(Some(Stopped { base, left })) = stopped {
            setup.base = Some(base);
            (self.drained, self.suspended) = (left == 0, left != 0);
        }
        let base = setup.base;
        self.state = State::Setup(setup);
        stopped?;
        Ok(base)
    }

    /// Restores the initial state, except for the call and error descriptors. The driver no longer expects the requests with which
    /// the vring was suspended.
    pub(super) fn reset(&mut self, engine: &Engine) -> Result<(), Error> {
        let stopped = self.stop(engine, Stop::Drain);
        self.drained |= std::mem::take(&mut self.suspended);
        self.state = State::default();
        (self.enabled, self.used_log) = (false, None);
        stopped.map(|_| ())
    }
}

fn duplicate(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Error> {
    fd.map(OwnedFd::try_clone).transpose().map_err(Error::system("duplicate an event descriptor"))
}
