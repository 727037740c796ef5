//! The server under test, in this process: socket, session, passthrough and emulated NVMe function.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::coherency::{Facts, Personality, Policy, Verdict, decide};
use vhost_device_vfio::emulated::{EmulatedCdev, Machine, Options};
use vhost_device_vfio::kvm::{Shim, Vmm};
use vhost_device_vfio::passthrough::{BarAccess, Passthrough, ReacquireError, Reacquired};
use vhost_device_vfio::qmp::Monitor;
use vhost_device_vfio::socket::{Endpoint, Listen};
use vhost_device_vfio::vfio_user::{EndReason, Server};
use vmm_sys_util::tempdir::TempDir;

use crate::client::Client;
use crate::host_request::WithoutMsix;

/// A running server and its emulated machine.
pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) path: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<EndReason>>,
    _directory: TempDir,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(&Options { size: 1 << 20, queues: 16, ..Options::default() }, Policy::Suppress)
    }

    /// A server of an emulated function with `options`, under `policy`.
    pub(crate) fn with(options: &Options, policy: Policy) -> Self {
        let machine = Machine::new(options.clone()).unwrap();
        let facts = machine.facts(policy).unwrap();
        // An emulated function needs no registration with KVM.
        let facts = Facts { personality: Personality::WholeFunction, shim: true, ..facts };
        Self::with_facts(machine, facts, Vmm::without_shim())
    }

    /// A server of an emulated function that registers with the shim at this path, as if it had a VFIO device file.
    pub(crate) fn registered(options: &Options, shim: &Path) -> Self {
        let machine = Machine::new(options.clone()).unwrap();
        let facts = Facts { personality: Personality::WholeFunction, ..machine.facts(Policy::Allow).unwrap() };
        let (device, file) = ("registered".into(), Some("/dev/null".into()));
        Self::with_facts(machine, facts, Vmm::with_shim(Shim { socket: shim.into(), device, facts, file }))
    }

    fn with_facts(machine: Machine, facts: Facts, vmm: Vmm) -> Self {
        let flushed = matches!(decide(&Facts { shim: true, ..facts }), Verdict::Flush(_));
        let space = if flushed { machine.staged_space() } else { machine.space() };
        let device = Passthrough::new(machine.whole_function(), space, BarAccess::Direct, facts, !facts.shim).unwrap();
        Self::serve(machine, device, vmm)
    }

    /// A server of an emulated function without MSI-X, with QEMU's monitor.
    pub(crate) fn with_monitor(monitor: Monitor) -> Self {
        let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
        let facts = machine.facts(Policy::Suppress).unwrap();
        let facts = Facts { personality: Personality::WholeFunction, shim: true, ..facts };
        let function = Arc::new(WithoutMsix(machine.whole_function()));
        let device = Passthrough::new(function, machine.space(), BarAccess::Direct, facts, false).unwrap();
        Self::start(machine, device, |endpoint, device| {
            Server::new(endpoint, device, Vmm::without_shim()).with_monitor(monitor)
        })
    }

    /// A server of an emulated function whose own file is handed out for BAR 0, and that file.
    pub(crate) fn with_own_file() -> (Self, Arc<EmulatedCdev>) {
        let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
        let facts = machine.facts(Policy::Suppress).unwrap();
        let facts = Facts { personality: Personality::WholeFunction, shim: true, ..facts };
        let cdev = Arc::new(EmulatedCdev::new(machine.whole_function(), true));
        let bound = cdev.bind().unwrap();
        let device = Passthrough::new(bound, machine.space(), BarAccess::Direct, facts, false).unwrap();
        let file = Arc::clone(&cdev);
        let device = device.with_reacquire(Box::new(move || {
            let function = file.bind().map_err(|error| ReacquireError::Held(error.into()))?;
            Ok(Reacquired { function, facts })
        }));
        (Self::serve(machine, device, Vmm::without_shim()), cdev)
    }

    fn serve(machine: Machine, device: Passthrough, vmm: Vmm) -> Self {
        Self::start(machine, device, |endpoint, device| Server::new(endpoint, device, vmm))
    }

    fn start(machine: Machine, device: Passthrough, server: impl FnOnce(Endpoint, Passthrough) -> Server) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("s");
        let endpoint = Listen::Path(path.clone()).open().unwrap();
        let stop = event();
        let server_stop = stop.try_clone().unwrap();
        let server = server(endpoint, device);
        let thread = Some(std::thread::spawn(move || server.run(&server_stop).unwrap()));
        Self { machine, path, stop, thread, _directory: directory }
    }

    /// A front-end that has sent nothing yet.
    pub(crate) fn connect(&self) -> Client {
        Client::new(UnixStream::connect(&self.path).unwrap())
    }

    /// A front-end that has negotiated the version.
    pub(crate) fn client(&self) -> Client {
        let mut client = self.connect();
        client.version().unwrap();
        client
    }

    /// Bytes mapped for the device.
    pub(crate) fn mapped(&self) -> u64 {
        self.machine.iommu().mapped().iter().map(|span| span.len()).sum()
    }

    /// Waits until `condition` holds, at most 10 s. The server detects a disconnected front-end asynchronously.
    pub(crate) fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        (0..2000)
            .find(|_| {
                condition(self) || {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    false
                }
            })
            .unwrap();
    }

    /// Waits until the server stops by itself, and returns the reason.
    pub(crate) fn wait_for_exit(mut self) -> EndReason {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            signal(&self.stop);
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.unwrap() == EndReason::Stopped);
        }
    }
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

pub(crate) fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
}

/// Waits for `event`; false if it is not signalled in time.
pub(crate) fn wait_for(event: &OwnedFd, milliseconds: i64) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
    let wait = Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 };
    let found = poll(&mut fds, Some(&wait)).unwrap() == 1;
    if found {
        rustix::io::read(event, &mut [0; 8]).unwrap();
    }
    found
}

/// Shared memory of this size.
pub(crate) fn memory(bytes: u64) -> Arc<File> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, bytes).unwrap();
    Arc::new(file)
}
