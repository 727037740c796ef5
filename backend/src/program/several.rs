//! Serves several namespaces of one NVMe drive as virtio disks over vhost-user, each on a socket of its own. A server has a
//! thread, an engine and a part of the device's address space; the drive, its watchdog and its recovery are common to all.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use vhost_device_vfio::addr::{Bytes, IovaSlice, Span};
use vhost_device_vfio::coherency::Facts;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::hardware::AddressSpace;
use vhost_device_vfio::kvm::Vmm;
use vhost_device_vfio::sandbox::{self, Role};
use vhost_device_vfio::service_manager::{self, FdStore, Stored};
use vhost_device_vfio::socket::Endpoint;
use vhost_device_vfio::vhost_user::{Device, Error, Server};

use super::Signals;
use super::block::{Drive, statistics};
use super::origin::{Acquired, DeviceSource};

/// Serves the namespaces of the command line on `endpoints`, in the same order, until `stop` is readable or one of the servers
/// has ended.
///
/// # Errors
/// Why they cannot be served, or one can no longer be served.
pub(crate) fn serve(
    config: &Config,
    source: &DeviceSource,
    endpoints: Vec<Endpoint>,
    stored: Option<Stored>,
    signals: &Signals,
) -> Result<()> {
    forget(config, stored);
    let Acquired { owned, reacquire, .. } = source.acquire_for_driver(config.no_snoop.into())?;
    // Before the drive is brought up: a lack of address space must not cost a controller reset.
    let slices = slices(&*owned.space, endpoints.len())?;
    let Drive { engines, space, name, facts } = Drive::bring_up(config, owned, reacquire, None)?;
    let queues = config.queue_count();
    let mut servers = Vec::new();
    let parts = engines.into_iter().zip(slices).zip(endpoints).zip(&config.namespace);
    for (disk, (((engine, slice), endpoint), id)) in parts.enumerate() {
        log::info!(
            "serving {name} namespace {id}, disk {disk}, on {queues} virtqueues, {endpoint}; IOVA = GPA + {}, up to {} of guest \
             memory",
            slice.start(),
            Bytes(slice.size()),
        );
        let (vmm, withheld) = (Vmm::without_shim(), config.rings.withheld());
        let device = Device { engine, space: space.clone(), slice, queues, vmm, withheld };
        let server = Server::new(endpoint, device)?;
        server.notify_config_changes();
        servers.push((disk, *id, server));
    }
    run_all(servers, signals, &facts)
}

/// Removes from the service manager's store what a process with one namespace has left there. Its front-end would wait for
/// ever.
fn forget(config: &Config, stored: Option<Stored>) {
    let (Some(stored), Some(terms)) = (stored, config.terms()) else { return };
    if let Some(mut store) = FdStore::open(terms, Some(&stored)) {
        log::warn!("no session is kept with several namespaces; the front-end of the process before is disconnected");
        store.clear();
    }
}

/// Divides the device's address space.
fn slices(space: &dyn AddressSpace, count: usize) -> Result<Vec<IovaSlice>> {
    let allowed = space.allowed().context("read the allowed IOVA ranges")?;
    IovaSlice::divide(&allowed, count).with_context(|| {
        let bytes = allowed.iter().map(Span::len).fold(0, u64::saturating_add);
        format!(
            "the IOMMU allows {} of I/O virtual addresses, which is less than 1G for each of {count} namespaces and for the \
             driver; serve fewer namespaces",
            Bytes(bytes)
        )
    })
}

/// Runs each server on its own thread until all have ended. When one ends, all do.
fn run_all(servers: Vec<(usize, u32, Server)>, signals: &Signals, facts: &Facts) -> Result<()> {
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("eventfd");
    let (quit, ended) = (event()?, event()?);
    sandbox::enter(Role::Control);
    service_manager::ready();
    let mut threads = Vec::new();
    for (disk, id, server) in servers {
        let spawned = spawn(disk, server, &quit, &ended);
        threads.push((id, spawned.inspect_err(|_| signal(&quit))?));
    }
    let waited = wait(signals, &ended);
    service_manager::stopping();
    signal(&quit);
    let joined = threads.into_iter().map(|(id, thread)| {
        let (server, served) = thread.join().map_err(|_| anyhow!("bug: the server of namespace {id} panicked"))?;
        log::info!("statistics: namespace={id} {}", statistics(server.device(), facts));
        server.into_device().engine.shut_down();
        served.with_context(|| format!("namespace {id}"))
    });
    // All are joined and shut down, whatever the first error.
    let results: Vec<Result<()>> = joined.collect();
    results.into_iter().fold(waited, Result::and)
}

/// What begins the lines of the current thread: the disk that it serves, if there are several.
pub(crate) fn line_prefix() -> String {
    let current = std::thread::current();
    current.name().filter(|name| name.starts_with("disk ")).map(|name| format!("{name}: ")).unwrap_or_default()
}

type Served = (Server, Result<(), Error>);

/// Signals that a server has ended, also by a panic.
struct Ended(OwnedFd);

impl Drop for Ended {
    fn drop(&mut self) {
        signal(&self.0);
    }
}

fn signal(event: &OwnedFd) {
    if let Err(errno) = rustix::io::write(event, &1_u64.to_ne_bytes()) {
        log::error!("signal an eventfd: {errno}");
    }
}

fn spawn(disk: usize, mut server: Server, quit: &OwnedFd, ended: &OwnedFd) -> Result<JoinHandle<Served>> {
    let duplicate = |fd: &OwnedFd| fd.try_clone().context("duplicate an eventfd");
    let (quit, ended) = (duplicate(quit)?, Ended(duplicate(ended)?));
    let run = move || {
        let _ended = ended;
        let served = server.run(quit);
        (server, served)
    };
    std::thread::Builder::new().name(format!("disk {disk}")).spawn(run).context("start a server")
}

/// Waits until the process is to stop, or a server has ended.
fn wait(signals: &Signals, ended: &OwnedFd) -> Result<()> {
    loop {
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [watch(signals.stop.as_fd()), watch(ended.as_fd()), watch(signals.upgrade.as_fd())];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for signals"),
        }
        if fds[..2].iter().any(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
        if !fds[2].revents().is_empty() {
            // One structure of signalfd, 128 bytes (signalfd(2)).
            rustix::io::read(&signals.upgrade, &mut [0; 128]).context("read a signal")?;
            log::warn!(
                "SIGUSR2: a process that serves several namespaces cannot hand them over; stop it and start it again"
            );
        }
    }
}
