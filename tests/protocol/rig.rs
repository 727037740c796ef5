//! The server under test, in this process: socket, session, engine, NVMe driver and emulated controller.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Iova, IovaSlice, Span};
use vhost_device_vfio::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use vhost_device_vfio::emulated::{Machine, Options};
use vhost_device_vfio::engine::{self, Engine};
use vhost_device_vfio::hardware::{AddressSpace, DmaBuffer, MapError, SecondSpace};
use vhost_device_vfio::kvm::Vmm;
use vhost_device_vfio::memory::Region;
use vhost_device_vfio::socket::{Listen, SocketError};
use vhost_device_vfio::vhost_user::{ConfigNotifier, Device, Error, Server, Succession, VirtioFeatures};
use vmm_sys_util::tempdir::TempDir;

use crate::wire::Wire;

/// Virtqueues that the server offers.
pub(crate) const QUEUES: u16 = 4;

/// An address space that fails on request.
pub(crate) struct FailingSpace {
    inner: Arc<dyn AddressSpace>,
    plan: Arc<FailurePlan>,
    pins: bool,
    on_change: Arc<dyn Fn(Change) + Send + Sync>,
}

type OnChange = Box<dyn Fn(Change) + Send + Sync>;

/// The environment of a [`Rig`]'s device.
pub(crate) struct Environment {
    /// The process that runs the VM.
    pub(crate) vmm: Vmm,
    /// What [`AddressSpace::pins`] returns.
    pub(crate) pins: bool,
    /// Called before guest memory is mapped and after it has been unmapped.
    pub(crate) on_change: OnChange,
    /// The drive.
    pub(crate) drive: Options,
    /// Who may wait while another front-end is served.
    pub(crate) succession: Succession,
    /// Features that are not offered.
    pub(crate) withheld: VirtioFeatures,
}

/// A change of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    BeforeMap,
    AfterUnmap,
}

impl Default for Environment {
    fn default() -> Self {
        let drive = Options { size: 16 << 20, queues: 2, ..Options::default() };
        let (vmm, succession) = (Vmm::without_shim(), Succession::default());
        let withheld = VirtioFeatures::empty();
        Self { vmm, pins: false, on_change: Box::new(|_| ()), drive, succession, withheld }
    }
}

/// Which changes of the address space fail.
struct FailurePlan {
    /// Number of changes that succeed before one fails. Negative: none fails.
    successes: AtomicI64,
    /// All changes after that one fail, too.
    persistent: AtomicBool,
    /// `Some`: memory can be removed only while the device is idle. Counts these removals.
    while_idle: Mutex<Option<usize>>,
}

impl FailurePlan {
    fn none() -> Arc<Self> {
        Arc::new(Self {
            successes: AtomicI64::new(-1),
            persistent: AtomicBool::new(false),
            while_idle: Mutex::default(),
        })
    }
}

impl FailingSpace {
    fn check(&self, span: Span<Iova>) -> Result<(), MapError> {
        let left = self.plan.successes.load(Ordering::SeqCst);
        if left > 0 || left == 0 && !self.plan.persistent.load(Ordering::SeqCst) {
            self.plan.successes.store(left - 1, Ordering::SeqCst);
        }
        if left == 0 {
            Err(MapError::MemLock { span, needed_kib: 2048, allowed_kib: 64, whose: "this process" })
        } else {
            Ok(())
        }
    }
}

impl AddressSpace for FailingSpace {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.check(region.iova())?;
        (self.on_change)(Change::BeforeMap);
        self.inner.add(region)
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        let span = region.iova();
        self.check(span)?;
        if self.plan.while_idle.lock().unwrap().is_some() {
            return Err(MapError::DeviceMustBeIdle { span });
        }
        self.inner.remove(region)?;
        (self.on_change)(Change::AfterUnmap);
        Ok(())
    }

    fn remove_while_idle(&self, region: &Region) -> Result<(), MapError> {
        if let Some(times) = &mut *self.plan.while_idle.lock().unwrap() {
            *times += 1;
        }
        self.inner.remove(region)?;
        (self.on_change)(Change::AfterUnmap);
        Ok(())
    }

    fn pins(&self) -> bool {
        self.pins
    }

    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        let (inner, pins, on_change) = (self.inner.second()?, self.pins, Arc::clone(&self.on_change));
        let space = Arc::new(Self { inner: inner.space(), plan: FailurePlan::none(), pins, on_change });
        Ok(Arc::new(WatchedSecond { inner, space }))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

/// A second address space whose changes are reported.
struct WatchedSecond {
    inner: Arc<dyn SecondSpace>,
    space: Arc<FailingSpace>,
}

impl SecondSpace for WatchedSecond {
    fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::clone(&self.space) as Arc<dyn AddressSpace>
    }

    fn exchange(&self) -> Result<(), MapError> {
        self.inner.exchange()
    }
}

/// A running server. Dropping it stops the server. The test fails if the server returns an error.
pub(crate) struct Rig {
    _directory: TempDir,
    pub(crate) path: PathBuf,
    machine: Machine,
    driver_memory: Vec<Span<Iova>>,
    failures: Arc<FailurePlan>,
    stop: OwnedFd,
    pub(crate) notifier: ConfigNotifier,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Rig {
    /// A server that listens on a path.
    pub(crate) fn new() -> Self {
        Self::on_socket(Listen::Path)
    }

    /// The same with another drive.
    pub(crate) fn with_drive(drive: Options) -> Self {
        Self::build(Listen::Path, Environment { drive, ..Environment::default() })
    }

    /// The same in another environment.
    pub(crate) fn with(environment: Environment) -> Self {
        Self::build(Listen::Path, environment)
    }

    /// A server on the socket that `listen` creates from a path.
    pub(crate) fn on_socket(listen: impl FnOnce(PathBuf) -> Listen) -> Self {
        Self::build(listen, Environment::default())
    }

    fn build(listen: impl FnOnce(PathBuf) -> Listen, environment: Environment) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("socket");
        let machine = Machine::new(environment.drive.clone()).unwrap();
        let failures = FailurePlan::none();
        let succession = environment.succession.clone();
        let device = device(&machine, Arc::clone(&failures), environment);
        let driver_memory = machine.iommu().mapped();
        let mut server = Server::new(listen(path.clone()).open().unwrap(), device).unwrap();
        server.allow_succession(&succession);
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let server_stop = stop.try_clone().unwrap();
        let notifier = server.config_notifier();
        let thread = std::thread::spawn(move || server.run(server_stop));
        Self { _directory: directory, path, machine, driver_memory, failures, stop, notifier, thread: Some(thread) }
    }

    /// A new front-end.
    pub(crate) fn connect(&self) -> Wire {
        Wire::new(UnixStream::connect(&self.path).unwrap())
    }

    /// Guest memory that is mapped for the device: addresses and sizes.
    pub(crate) fn guest_memory(&self) -> Vec<(u64, u64)> {
        let spans = self.machine.iommu().mapped();
        let guest = spans.iter().filter(|span| !self.driver_memory.contains(span));
        guest.map(|span| (span.start().0, span.len())).collect()
    }

    /// The host requests the device back, as when an administrator unbinds it.
    pub(crate) fn request_removal(&self) {
        self.machine.request_removal();
    }

    /// Makes one change of the address space fail, after `successes` successful ones.
    pub(crate) fn fail_after(&self, successes: i64) {
        self.failures.persistent.store(false, Ordering::SeqCst);
        self.failures.successes.store(successes, Ordering::SeqCst);
    }

    /// From now on, memory can be removed only while the device is idle.
    pub(crate) fn remove_only_while_idle(&self) {
        *self.failures.while_idle.lock().unwrap() = Some(0);
    }

    /// The number of regions that have been removed while the device was idle.
    pub(crate) fn removals_while_idle(&self) -> usize {
        self.failures.while_idle.lock().unwrap().unwrap_or_default()
    }

    /// Makes all changes of the address space fail after `successes` successful ones.
    pub(crate) fn fail_all_after(&self, successes: i64) {
        self.failures.persistent.store(true, Ordering::SeqCst);
        self.failures.successes.store(successes, Ordering::SeqCst);
    }

    /// Stops the server and waits for it.
    pub(crate) fn stop(mut self) {
        self.try_stop().unwrap();
    }

    /// As [`Self::stop`]. Calls `check` before the directory of the socket is removed.
    pub(crate) fn stop_then(mut self, check: impl FnOnce()) {
        self.try_stop().unwrap();
        check();
    }

    /// Waits until the server has stopped by itself.
    pub(crate) fn join(mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    fn try_stop(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).unwrap();
        thread.join().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let result = self.try_stop();
        assert!(std::thread::panicking() || result.is_ok(), "{result:?}");
    }
}

/// A server on `listen` that is not run.
pub(crate) fn open(listen: Listen) -> Result<Server, SocketError> {
    let machine = Machine::new(Options { size: 1 << 20, queues: 2, ..Options::default() }).unwrap();
    let endpoint = listen.open()?;
    Ok(Server::new(endpoint, device(&machine, FailurePlan::none(), Environment::default())).unwrap())
}

fn device(machine: &Machine, plan: Arc<FailurePlan>, environment: Environment) -> Device {
    let Environment { vmm, pins, on_change, withheld, .. } = environment;
    let on_change = Arc::from(on_change);
    let space: Arc<dyn AddressSpace> = Arc::new(FailingSpace { inner: machine.space(), plan, pins, on_change });
    let options = NvmeOptions {
        namespaces: Vec::new(),
        queues: 2,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    };
    let driver = Nvme::bring_up(machine.function(), Arc::clone(&space), options).unwrap();
    let options = engine::Options {
        rings: QUEUES.into(),
        spin: Duration::from_micros(10),
        drain_timeout: Duration::from_secs(5),
        watch: engine::WatchdogOptions::default(),
        placement: Default::default(),
    };
    let engine = Engine::start(Box::new(driver), &space, options).unwrap();
    Device { engine, space, slice: IovaSlice::WHOLE, queues: QUEUES, vmm, withheld }
}

/// A new memory file, as a front-end creates one.
pub(crate) fn memory(name: &str, bytes: u64) -> File {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    File::from(fd)
}

/// A new eventfd, as a front-end creates one.
pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// The flags of every other descriptor in this process that refers to the same object as `of`. Memory files are identified
/// by inode, eventfds by their kernel id.
pub(crate) fn copies_of(of: impl AsFd) -> Vec<u32> {
    let own = of.as_fd().as_raw_fd();
    let identity = |number: &str| {
        let target = std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
        let field = |name| info.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
        let flags = u32::from_str_radix(&field("flags:")?, 8).ok()?;
        Some(((target, field("ino:"), field("eventfd-id:")), flags))
    };
    let (expected, _) = identity(&own.to_string()).unwrap();
    let names = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap()).filter(|name| *name != own.to_string());
    names.filter_map(|name| identity(&name)).filter(|(found, _)| *found == expected).map(|(_, flags)| flags).collect()
}
