//! Serves an NVMe drive as a virtio disk over vhost-user.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use vhost_device_vfio::addr::IovaSlice;
use vhost_device_vfio::board::Board;
use vhost_device_vfio::coherency::{Facts, decide};
use vhost_device_vfio::config::Config;
use vhost_device_vfio::control::{Personality, Subject};
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions, ReacquireFn};
use vhost_device_vfio::driver::{DiskState, Identification};
use vhost_device_vfio::engine::{Engine, Handle, Options};
use vhost_device_vfio::handover::{Applicants, Incoming, Terms};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::sandbox::{self, Role};
use vhost_device_vfio::service_manager::{self, FdStore, Heartbeat, SavedSession, Stored};
use vhost_device_vfio::socket::Endpoint;
use vhost_device_vfio::vhost_user::{Device, HandOver, Inheritance, OpenStoreFn, Server, SettleFn, Succession};

use super::operator::{Doors, Operator, hooks, report_front_ends};
use super::origin::{Acquired, DeviceSource};
use super::{OwnedFunction, Signals, placement};

/// Time-out for commands in flight when a ring is stopped or memory is removed. The device is reset after it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A drive that has been brought up.
pub(crate) struct Drive {
    /// One for each namespace, in the order of the command line.
    pub(crate) engines: Vec<Engine>,
    pub(crate) space: Arc<dyn AddressSpace>,
    pub(crate) name: String,
    pub(crate) facts: Facts,
}

/// A drive that has been brought up, with the server of its only disk.
pub(crate) struct Disk {
    pub(crate) server: Server,
    pub(crate) subject: Arc<Subject>,
    pub(crate) operator: Operator,
    name: String,
    facts: Facts,
}

/// Serves the drive until `stop` is readable, or another process has taken it over.
///
/// # Errors
/// Why it cannot be served, or can no longer be served.
pub(crate) fn serve(
    config: &Config,
    source: &DeviceSource,
    (endpoint, doors): (Endpoint, Doors),
    mut stored: Option<Stored>,
    signals: Signals,
) -> Result<()> {
    let Acquired { owned, reacquire, movable } = source.acquire_for_driver(config.no_snoop.into())?;
    let mut disk = Disk::bring_up(config, owned, reacquire, endpoint, None)?;
    let mut applicants = applicants(config, signals.upgrade)?;
    if let Some(path) = &config.handover_socket {
        applicants.listen(path).with_context(|| format!("--handover-socket {}", path.display()))?;
    }
    disk.server.allow_hand_over(HandOver { applicants, function: movable });
    disk.operator = doors.serve(&disk.subject)?;
    let terms = config.terms().context("no device")?;
    let saved = stored.as_mut().and_then(|stored| find_saved(stored, &terms));
    let open_store = Box::new(move || FdStore::open(terms, stored.as_ref()));
    disk.run(signals.stop, Some(inheritance(saved, open_store)))
}

/// The session that the process before has left with the service manager.
fn find_saved(stored: &mut Stored, terms: &Terms) -> Option<(SavedSession, Incoming)> {
    stored.session(terms).unwrap_or_else(|reason| {
        log::warn!("{reason}; its front-end is disconnected");
        None
    })
}

/// Goes on with a saved session, if there is one.
fn inheritance(saved: Option<(SavedSession, Incoming)>, open_store: OpenStoreFn) -> Inheritance {
    let settle: SettleFn = Box::new(|restored| {
        if let Err(error) = restored {
            log::error!("the session of the process before: {error}; its front-end is disconnected");
        }
    });
    let Some((SavedSession { live: crashed, write_cache, front_end, .. }, descriptors)) = saved else {
        let descriptors = Incoming::default();
        return Inheritance { front_end: None, write_cache: None, crashed: false, descriptors, settle, open_store };
    };
    let how = if crashed { "crashed" } else { "stopped" };
    log::info!("going on with the front-end of the process before, which has {how}");
    let write_cache = Some(write_cache);
    Inheritance { front_end: Some(front_end), write_cache, crashed, descriptors, settle, open_store }
}

/// Who may take the drive over.
pub(crate) fn applicants(config: &Config, upgrade: OwnedFd) -> Result<Applicants> {
    let terms = config.terms().context("no device")?;
    Applicants::new(terms, upgrade).context("prepare for a successor")
}

/// What an operator sees and controls.
fn subject(
    name: &str,
    facts: Facts,
    board: &Arc<Board>,
    space: &Arc<dyn AddressSpace>,
    (engine, succession): (Handle, &Succession),
) -> Arc<Subject> {
    let named = (Personality::VhostUserBlk, name.to_owned());
    let hooks = hooks(Personality::VhostUserBlk, succession);
    Arc::new(Subject::new(named, facts, Arc::clone(board), Arc::clone(space), Some(engine), hooks))
}

/// Fails unless the disk is the one that `--expect-disk` names.
fn check_identity(name: &str, engine: &Engine, wanted: &str) -> Result<()> {
    let found = engine.handle().identify()?;
    let Identification { serial, nguid, eui64, .. } = &found;
    ensure!(
        found.is(wanted),
        "{name}: --expect-disk {wanted}, found another disk: serial {serial}, NGUID {nguid}, EUI64 {eui64}"
    );
    Ok(())
}

impl Drive {
    /// Brings the drive up and starts the engines. Its only disk must be the one that `before` describes.
    ///
    /// # Errors
    /// Why it cannot be served.
    pub(crate) fn bring_up(
        config: &Config,
        owned: OwnedFunction<dyn Function>,
        reacquire: Option<ReacquireFn>,
        before: Option<&DiskState>,
    ) -> Result<Self> {
        let (space, facts) = (Arc::clone(&owned.space), owned.facts);
        let name = owned.function.name().to_owned();
        let placed = placement::place(config, &name)?;
        let queues = config.queue_count();
        let disks = u16::try_from(config.namespace.len().max(1)).unwrap_or(u16::MAX);
        let options = NvmeOptions {
            namespaces: config.namespace.clone(),
            queues: queues.saturating_mul(disks),
            read_only: config.read_only,
            interrupts: config.interrupts.into(),
            avoid: config.avoid.iter().map(|&what| what.into()).collect(),
        };
        let mut nvme = Nvme::bring_up(owned.function, Arc::clone(&space), options)?;
        before.map_or(Ok(()), |before| nvme.continue_from(before))?;
        // Not with a shim: KVM would have to be told of the new device file before any memory is mapped.
        if let (Some(reacquire), None) = (reacquire, &config.kvm_socket) {
            nvme = nvme.with_reacquire(reacquire);
        }
        let options = Options {
            rings: usize::from(queues),
            spin: config.spin(),
            drain_timeout: DRAIN_TIMEOUT,
            watch: config.watchdog(),
            placement: placed.placement,
        };
        let engines = Engine::start_all(Box::new(nvme), &space, options)?;
        Ok(Self { engines, space, name, facts })
    }
}

impl Disk {
    /// Brings the drive up and starts the engine. It must be the disk that `before` describes.
    ///
    /// # Errors
    /// Why it cannot be served.
    pub(crate) fn bring_up(
        config: &Config,
        owned: OwnedFunction<dyn Function>,
        reacquire: Option<ReacquireFn>,
        endpoint: Endpoint,
        before: Option<&DiskState>,
    ) -> Result<Self> {
        let vmm = owned.vmm(config, owned.function.name());
        let Drive { mut engines, space, name, facts } = Drive::bring_up(config, owned, reacquire, before)?;
        let engine = engines.pop().context("the drive has no disk")?;
        config.expect_disk.as_deref().map_or(Ok(()), |wanted| check_identity(&name, &engine, wanted))?;
        let (queues, kib) = (config.queue_count(), space.statistics().mapped / 1024);
        let board = Arc::<Board>::default();
        report_front_ends(&board, &name, decide(&facts).word());
        let succession = Succession::default();
        if config.successor {
            succession.allow_always();
        }
        let subject = subject(&name, facts, &board, &space, (engine.handle(), &succession));
        if config.latency {
            subject.measure(true).map_err(anyhow::Error::msg)?;
        }
        let withheld = config.rings.withheld();
        let device = Device { engine, space, slice: IovaSlice::WHOLE, queues, vmm, withheld };
        let mut server = Server::new(endpoint, device)?;
        server.post_on(&board);
        server.allow_succession(&succession);
        let heartbeat = Heartbeat::wanted(before.is_some()).context("watchdog of the service manager")?;
        server.beat(heartbeat);
        server.notify_config_changes();
        log::info!("serving {name} on {queues} virtqueues; {kib} KiB mapped");
        Ok(Self { server, subject, operator: Operator::default(), name, facts })
    }

    /// Serves front-ends, beginning with the one that is inherited, if there is one.
    ///
    /// # Errors
    /// Why the drive can no longer be served.
    pub(crate) fn run(mut self, stop: OwnedFd, inheritance: Option<Inheritance>) -> Result<()> {
        sandbox::enter(Role::Control);
        service_manager::ready();
        let served = self.server.run_with(stop, inheritance);
        self.log_statistics();
        if let Some(successor) = self.server.successor() {
            service_manager::main_pid(successor);
            log::info!("{}: process {successor} serves it now", self.name);
            // Whatever would be dropped here is the successor's: it must be neither unmapped, nor reset, nor removed. The kernel
            // closes this process's descriptors, of which the successor has duplicates.
            std::process::exit(0);
        }
        service_manager::stopping();
        // Before the device is shut down, so that nobody asks it for anything afterwards.
        self.operator.close();
        self.server.into_device().engine.shut_down();
        Ok(served?)
    }

    fn log_statistics(&self) {
        log::info!("statistics: {}", statistics(self.server.device(), &self.facts));
    }
}

/// The statistics of a disk, of its drive's address space and of the registrations with KVM.
pub(crate) fn statistics(device: &Device, facts: &Facts) -> String {
    let Device { engine, space, vmm, .. } = device;
    let verdict = decide(facts).word();
    format!("{} {} verdict={verdict} {}", engine.statistics(), space.statistics(), vmm.registrations())
}
