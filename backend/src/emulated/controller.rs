//! The controller: its states, and how it starts and stops (NVMe 2.0 §3.5, §3.6).
//!
//! ```text
//!             CC.EN 0->1, values valid               CC.SHN
//! Disabled --------------------------> Ready ---------------------> Shut down
//!   ^  ^  \  values invalid --> Fatal <--/ queue memory unreachable     /
//!   |  +-------------------- CC.EN 1->0, from any state ---------------+
//!   +---------- function reset, from any state
//! ```
//!
//! Commands run only in Ready and with bus master on. Lock order: registers, submission queue, completion queue, IOMMU, admin
//! state. To stop the controller, a thread clears `ready` and then takes each queue's lock once. No DMA is running afterwards.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::admin_state::Admin;
use super::fault::Faults;
use super::interrupts::Interrupts;
use super::iommu::SoftIommu;
use super::medium::Store;
use super::namespaces::Namespaces;
use super::order::Latency;
use super::queue::{Cq, CqSlot, Sq, SqSlot};
use super::register_file::{CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN_DONE, CSTS_SHUTDOWN_MASK, RegisterFile};
use super::registers::CMB_ENABLED;
use super::traffic::Traffic;
use super::traits::AnaState;
use super::wire::Status;
use super::zones::Zones;
use super::{EmulatedError, Medium, Mode, Options, lock};

pub(super) struct Controller {
    pub(super) options: Options,
    pub(super) namespaces: Namespaces,
    pub(super) store: Store,
    /// The zones, if the namespace has them.
    pub(super) zones: Option<Zones>,
    pub(super) iommu: SoftIommu,
    pub(super) registers: Mutex<RegisterFile>,
    pub(super) csts: AtomicU32,
    /// Page size of CC.MPS in bytes; valid while enabled.
    pub(super) page: AtomicU32,
    pub(super) write_cache: AtomicBool,
    pub(super) bus_master: AtomicBool,
    /// False while memory decoding is off: registers read as all ones.
    pub(super) decoding: AtomicBool,
    /// True if CC.IOSQES and CC.IOCQES hold the entry sizes of this controller.
    pub(super) entry_sizes_set: AtomicBool,
    ready: AtomicBool,
    pub(super) sqs: Box<[SqSlot]>,
    pub(super) cqs: Box<[CqSlot]>,
    pub(super) admin: Mutex<Admin>,
    pub(super) interrupts: Interrupts,
    /// [`AnaState`], 0 if it is not reported.
    pub(super) ana: AtomicU8,
    /// CMBMSC.
    pub(super) memory_buffer: AtomicU64,
    /// Until when all registers read as ones.
    pub(super) blind_until: Mutex<Duration>,
    pub(super) bad_doorbells: AtomicU32,
    /// True if an event may be pending for which no Asynchronous Event Request has been completed.
    pub(super) event_pending: AtomicBool,
    pub(super) faults: Faults,
    pub(super) latency: Latency,
    start: Instant,
    /// Nanoseconds that [`Self::advance`] has added to the clock.
    advanced: AtomicU64,
    /// The thread that handles doorbells in threaded mode.
    pub(super) thread: OnceLock<Thread>,
}

impl Controller {
    pub(super) fn new(options: Options, iommu: SoftIommu) -> Result<Self, EmulatedError> {
        let (store, namespaces) = Namespaces::open(&options)?;
        let zones = open_zones(&options, namespaces.blocks_of_first())?;
        let pairs = usize::from(options.queues) + 1;
        Ok(Self {
            namespaces,
            store,
            zones,
            iommu,
            registers: Mutex::default(),
            csts: AtomicU32::new(0),
            page: AtomicU32::new(4096),
            write_cache: AtomicBool::new(options.volatile_cache),
            bus_master: AtomicBool::new(false),
            decoding: AtomicBool::new(true),
            entry_sizes_set: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            sqs: (0..pairs).map(|_| SqSlot::default()).collect(),
            cqs: (0..pairs).map(|_| CqSlot::default()).collect(),
            admin: Mutex::new(Admin::new(&options)),
            interrupts: Interrupts::new(&options),
            ana: AtomicU8::new(options.traits.ana.map_or(0, |state| state as u8)),
            memory_buffer: AtomicU64::new(if options.traits.memory_buffer { CMB_ENABLED } else { 0 }),
            blind_until: Mutex::default(),
            bad_doorbells: AtomicU32::new(0),
            event_pending: AtomicBool::new(false),
            faults: Faults::default(),
            latency: Latency::new(options.latency, options.order),
            start: Instant::now(),
            advanced: AtomicU64::new(0),
            thread: OnceLock::new(),
            options,
        })
    }

    /// The state of the path; `None` if it is not reported.
    pub(super) fn ana(&self) -> Option<AnaState> {
        AnaState::from_u8(self.ana.load(SeqCst))
    }

    /// Fails an I/O command whose path cannot be used (NVMe 2.0 §8.1.3).
    #[inline]
    pub(super) fn check_path(&self) -> Result<(), Status> {
        if self.ana.load(Relaxed) == 0 { Ok(()) } else { self.check_reported_path() }
    }

    #[cold]
    fn check_reported_path(&self) -> Result<(), Status> {
        match self.ana() {
            None | Some(AnaState::Optimized | AnaState::NonOptimized) => Ok(()),
            Some(AnaState::PersistentLoss) => Err(Status::new(3, 1)),
            Some(AnaState::Inaccessible) => Err(Status::new(3, 2)),
            Some(AnaState::Change) => Err(Status::new(3, 3)),
        }
    }

    pub(super) fn may_run(&self) -> bool {
        self.ready.load(SeqCst) && self.bus_master.load(SeqCst)
    }

    /// Creates the admin queues and becomes ready. False if the registers hold invalid values (NVMe 2.0 §3.5.1), or addresses
    /// could be those of the memory buffer, which is not emulated.
    pub(super) fn enable(&self, registers: &RegisterFile) -> bool {
        let Some(page) = registers.page() else { return false };
        let (sq, cq) = (registers.admin_sq(), registers.admin_cq());
        let valid = |(base, entries): (u64, u32)| entries >= 2 && base.is_multiple_of(page.into());
        if !registers.command_set_is_valid(self.options.command_set.is_some())
            || !valid(sq)
            || !valid(cq)
            || self.memory_buffer.load(SeqCst) & 0b11 != 0
        {
            return false;
        }
        self.page.store(page, SeqCst);
        self.open_cq(0, Cq::new(cq.0, cq.1, Some(0)));
        self.open_sq(0, Sq::new(sq.0, sq.1, 0));
        self.csts.store(CSTS_READY, SeqCst);
        self.ready.store(true, SeqCst);
        true
    }

    /// Controller level reset: deletes all queues and discards all settings (NVMe 2.0 §3.7.2).
    pub(super) fn disable(&self) {
        self.ready.store(false, SeqCst);
        for id in 0..=self.options.queues {
            self.close_sq(id);
        }
        for id in 0..=self.options.queues {
            self.close_cq(id);
        }
        *lock(&self.admin) = Admin::new(&self.options);
        self.interrupts.reset();
        self.write_cache.store(self.options.volatile_cache, SeqCst);
    }

    /// Normal or abrupt shutdown: finishes running commands and flushes the medium (NVMe 2.0 §3.6.1).
    pub(super) fn shut_down(&self) {
        self.ready.store(false, SeqCst);
        self.wait_for_running_commands();
        if let Err(error) = self.store.flush() {
            log::error!("emulated function: flush at shutdown: {error}");
        }
        self.csts.fetch_and(!CSTS_SHUTDOWN_MASK, SeqCst);
        self.csts.fetch_or(CSTS_SHUTDOWN_DONE, SeqCst);
    }

    /// Waits until all commands fetched before the call have finished.
    pub(super) fn wait_for_running_commands(&self) {
        for slot in &self.sqs {
            drop(lock(&slot.state));
        }
    }

    /// Stops with Controller Fatal Status. Used when queue memory is unreachable and no completion can be posted.
    #[cold]
    pub(super) fn fatal(&self) {
        self.ready.store(false, SeqCst);
        self.csts.fetch_or(CSTS_FATAL, SeqCst);
    }

    pub(super) fn open_sq(&self, id: u16, queue: Sq) {
        let slot = &self.sqs[usize::from(id)];
        let mut state = lock(&slot.state);
        state.queue = Some(queue);
        slot.tail.store(0, SeqCst);
        slot.open.store(true, SeqCst);
    }

    pub(super) fn close_sq(&self, id: u16) {
        let slot = &self.sqs[usize::from(id)];
        slot.open.store(false, SeqCst);
        lock(&slot.state).queue = None;
    }

    pub(super) fn open_cq(&self, id: u16, queue: Cq) {
        let slot = &self.cqs[usize::from(id)];
        let mut state = lock(&slot.queue);
        *state = Some(queue);
        slot.head.store(0, SeqCst);
        slot.starved.store(false, SeqCst);
        slot.open.store(true, SeqCst);
    }

    pub(super) fn close_cq(&self, id: u16) {
        let slot = &self.cqs[usize::from(id)];
        slot.open.store(false, SeqCst);
        *lock(&slot.queue) = None;
    }

    /// Handles a register write: on this thread in inline mode, else on the controller's thread.
    #[inline]
    pub(super) fn wake(&self, work: impl FnOnce(&Self)) {
        match (self.options.mode, self.thread.get()) {
            (Mode::Inline, _) => work(self),
            (Mode::Threaded, Some(thread)) => thread.unpark(),
            (Mode::Threaded, None) => {}
        }
    }

    /// Time since creation. In inline mode only [`Self::advance`] moves it.
    pub(super) fn now(&self) -> Duration {
        let advanced = Duration::from_nanos(self.advanced.load(SeqCst));
        match self.options.mode {
            Mode::Inline => advanced,
            Mode::Threaded => self.start.elapsed().saturating_add(advanced),
        }
    }

    /// Advances the clock and executes commands that are due.
    pub(super) fn advance(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let added = |now: u64| Some(now.saturating_add(nanos));
        self.advanced.fetch_update(SeqCst, SeqCst, added).expect("the sum saturates");
        self.wake(|this| {
            this.run_all();
        });
    }

    /// Stops executing commands and ignores CC ([`Effect::Stick`](super::Effect::Stick)).
    pub(super) fn hang(&self) {
        self.faults.stuck_ready.store(true, SeqCst);
        self.ready.store(false, SeqCst);
    }

    /// Surprise removal: stops executing commands, and registers read as all ones.
    pub(super) fn remove(&self) {
        self.faults.removed.store(true, SeqCst);
        self.ready.store(false, SeqCst);
    }

    pub(super) fn traffic(&self) -> Traffic {
        let mut sum = Traffic {
            interrupts: self.interrupts.count.load(SeqCst).into(),
            bad_doorbells: self.bad_doorbells.load(SeqCst).into(),
            ..self.io_traffic()
        };
        sum.admin = lock(&self.sqs[0].state).traffic.admin;
        sum
    }

    /// Counters of the I/O queues only, so that an admin command, which holds the admin queue's lock, can read them.
    pub(super) fn io_traffic(&self) -> Traffic {
        let mut sum = Traffic::default();
        for slot in &self.sqs[1..] {
            let one = lock(&slot.state).traffic;
            sum.reads += one.reads;
            sum.writes += one.writes;
            sum.flushes += one.flushes;
            sum.others += one.others;
            sum.errors += one.errors;
            sum.bytes_read += one.bytes_read;
            sum.bytes_written += one.bytes_written;
            sum.passes += one.passes;
        }
        sum
    }
}

/// The zones of a namespace of `blocks` blocks; those of a medium in a file are in another beside it.
fn open_zones(options: &Options, blocks: u64) -> Result<Option<Zones>, EmulatedError> {
    if options.zones.size == 0 {
        return Ok(None);
    }
    let path = match &options.medium {
        Medium::File { path, .. } => {
            let mut name = path.clone().into_os_string();
            name.push(".zones");
            Some(PathBuf::from(name))
        }
        Medium::Memory | Medium::Null => None,
    };
    let opened = Zones::open(options.zones, options.lba, blocks, path.as_deref());
    let path = path.unwrap_or_default();
    opened.map(Some).map_err(|source| EmulatedError::File { path, operation: "open", source })
}
