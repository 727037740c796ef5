//! The block engine: it turns requests from vrings into commands for a device queue, and completions into used entries.
//! Workers own everything they touch. [`Engine`] is the control thread's handle on those of one disk. A device with several disks
//! has several engines, which share the driver, its supervisor and the watchdog.
//!
//! ```text
//!  control thread            worker n (one thread; virtqueues n, n + N, n + 2N …)
//!  Engine --- command queue ---->  Worker -> DataPath::{submit, reap} -> Chain -> request -> InflightRequest -> driver::Queue
//!         <-- reply -------         <- Virtqueue::publish  <-  answer  <- complete <----------
//! ```
//!
//! Workers share no lock and take none per request. The control thread waits for the reply to each command, so the worker has
//! executed it when a method returns.
//!
//! | module | contents |
//! |---|---|
//! | [`virtqueue`] | the memory layout of rings: split, packed, chains, the fast path for the common request |
//! | [`request`] | from a chain to a checked block request |
//! | `data_path/` | one worker's requests in flight, bounce buffers and cache maintenance |
//! | `worker/` | the thread, and the commands it takes |
//! | [`inflight_region`] | the record of requests in flight that outlives this process |
//! | `recovery/` | command time-outs, reset and recovery of the device |

mod counter;
mod data_path;
mod dirty_log;
mod error;
pub mod guest_memory;
mod handle;
mod hold;
mod inflight_policy;
pub mod inflight_region;
mod latency;
mod live_geometry;
mod recovery;
pub mod request;
mod setup;
mod statistics;
mod suspension;
pub mod virtqueue;
mod vring;
mod worker;
mod worker_control;
mod write_cache;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::event::{EventfdFlags, eventfd};

pub use dirty_log::{DirtyLogging, RingLog};
pub use error::EngineError;
pub use handle::{Handle, WorkerReport};
pub use hold::Held;
pub use inflight_region::InflightRegion;
pub use latency::{LatencySummary, OPERATIONS};
pub use live_geometry::LiveGeometry;
pub use recovery::{DeviceState, WatchdogOptions};
pub use setup::{Options, VringSetup};
pub use statistics::{RingStatistics, Statistics};
pub use suspension::Stopped;
pub use virtqueue::Layout;

use crate::addr::{Gpa, Span};
use crate::driver::{Driver, Geometry, Queue};
use crate::hardware::AddressSpace;
use crate::memory::MemTable;
use crate::placement::{CpuList, place};
use crate::sandbox::{Entry, Role};
use crate::sync::Mutex;
use crate::sync::mpsc::Sender;
use crate::sync::thread::{self, JoinHandle};
use data_path::{Bounce, CacheMaintenance, DataPath, WorkerLayout};
use hold::Holds;
use recovery::{CommandClock, DeviceSupervisor, OverdueReports, Watchdog};
use request::Disk;
use statistics::Counters;
use worker::{CommandQueue, Worker, WorkerCommand};

/// The control thread's view of one worker.
struct WorkerHandle {
    command_queue: Arc<CommandQueue>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<Worker>>,
    /// Where it runs, if that was chosen.
    cpus: Option<CpuList>,
}

/// The queue of a worker, and where that is to run.
type PlacedQueue = (Box<dyn Queue>, Option<CpuList>);

/// What the engines of one device share.
struct Drive {
    supervisor: Arc<DeviceSupervisor>,
    /// Absent until every worker has its queue, and during shutdown: nothing resets the device then.
    watchdog: OnceLock<Watchdog>,
    /// Held by the user of the idle device, see [`Engine::while_idle`].
    idle: Mutex<()>,
}

/// The workers of one disk, and the device.
///
/// A virtqueue is served while it is both started and enabled. The enabled state belongs to the virtqueue, not to the ring:
/// it is false initially, may be set before the start, and survives a stop (vhost-user: "Ring states").
pub struct Engine {
    workers: Vec<WorkerHandle>,
    /// The number of the disk.
    disk: usize,
    drive: Arc<Drive>,
    supervisor: Arc<DeviceSupervisor>,
    options: Options,
    live: Arc<LiveGeometry>,
    holds: Holds,
}

impl Engine {
    /// Starts the engine of a device with one disk, and one worker per queue. Worker n mod `workers` serves virtqueue n.
    ///
    /// # Errors
    /// As for [`Self::start_all`].
    pub fn start(
        driver: Box<dyn Driver>,
        space: &Arc<dyn AddressSpace>,
        options: Options,
    ) -> Result<Self, EngineError> {
        let mut engines = Self::start_all(driver, space, options)?;
        debug_assert_eq!(engines.len(), 1, "a device with one disk");
        Ok(engines.remove(0))
    }

    /// Starts an engine for each disk of `driver`, with one worker per queue of the disk. Each has as many virtqueues as
    /// `options` say. The last engine to be dropped shuts the device down.
    ///
    /// # Errors
    /// [`EngineError::NoQueues`], [`EngineError::Bounce`], [`EngineError::Watchdog`] or [`EngineError::Start`]. On error the
    /// device has been shut down.
    pub fn start_all(
        mut driver: Box<dyn Driver>,
        space: &Arc<dyn AddressSpace>,
        options: Options,
    ) -> Result<Vec<Self>, EngineError> {
        let queues = driver.take_queues();
        let workers = queues.len();
        let placed = |(n, queue)| (queue, options.placement.of_worker(n, workers));
        let mut queues: Vec<PlacedQueue> = queues.into_iter().enumerate().map(placed).collect();
        let reports = Arc::new(OverdueReports::new().map_err(EngineError::Watchdog)?);
        let released = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| EngineError::Watchdog(error.into()))?;
        let supervisor = Arc::new(DeviceSupervisor::new(driver, Arc::clone(&reports), released));
        let drive = Arc::new(Drive { supervisor, watchdog: OnceLock::new(), idle: Mutex::default() });
        let mut engines = Vec::new();
        for disk in 0..drive.supervisor.disks() {
            let others = queues.iter().position(|(queue, _)| queue.disk() != disk).unwrap_or(queues.len());
            let rest = queues.split_off(others);
            engines.push(Self::start_disk(disk, &drive, std::mem::replace(&mut queues, rest), space, options)?);
        }
        let watchdog = Watchdog::start(Arc::clone(&drive.supervisor), reports, options.watch);
        let set = drive.watchdog.set(watchdog.map_err(EngineError::Watchdog)?);
        debug_assert!(set.is_ok(), "started once");
        Ok(engines)
    }

    fn start_disk(
        disk: usize,
        drive: &Arc<Drive>,
        queues: Vec<PlacedQueue>,
        space: &Arc<dyn AddressSpace>,
        options: Options,
    ) -> Result<Self, EngineError> {
        let supervisor = Arc::clone(&drive.supervisor);
        let mut engine = Self {
            workers: Vec::with_capacity(queues.len()),
            disk,
            drive: Arc::clone(drive),
            live: supervisor.live(disk),
            supervisor,
            holds: Holds::default(),
            // If a worker cannot be started, the drop of `engine` must not stop rings of workers that do not exist.
            options: Options { rings: 0, ..options },
        };
        if queues.is_empty() {
            return Err(EngineError::NoQueues);
        }
        let workers = queues.len();
        for (worker, queue) in queues.into_iter().enumerate() {
            let slots = options.rings.saturating_sub(worker).div_ceil(workers);
            let handle = engine.spawn_worker(WorkerLayout { worker, workers, slots }, queue, space)?;
            engine.workers.push(handle);
        }
        engine.options = options;
        Ok(engine)
    }

    fn spawn_worker(
        &self,
        layout: WorkerLayout,
        (queue, cpus): PlacedQueue,
        space: &Arc<dyn AddressSpace>,
    ) -> Result<WorkerHandle, EngineError> {
        let number = layout.worker;
        let bounce = Bounce::new(space).map_err(|source| EngineError::Bounce { worker: number, source })?;
        let failed = |source| EngineError::Start { worker: number, source };
        let command_queue = Arc::new(CommandQueue::new().map_err(failed)?);
        let counters = Arc::new(Counters::new(layout.slots));
        let caches = CacheMaintenance::new(space.caches(), Arc::clone(&counters));
        let disk = Disk::new(&self.geometry(), Arc::clone(&self.live));
        let path = DataPath::new(&layout, disk, bounce, caches, Arc::clone(&counters));
        let clock = CommandClock::new(&self.supervisor.reports, self.options.watch);
        let worker =
            Worker::new(path, queue, Arc::clone(&command_queue), (self.options.spin, clock)).map_err(failed)?;
        self.supervisor.add_worker(self.disk, Arc::clone(&command_queue));
        let name = match self.supervisor.disks() {
            1 => format!("vdv-worker-{number}"),
            // The start of each line that it logs.
            _ => format!("disk {} worker {number}", self.disk),
        };
        let entry = Entry::new(Role::Worker);
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || {
                // Before its role, which may not change it.
                cpus.iter().for_each(place);
                entry.enter();
                worker.run()
            })
            .map_err(failed)?;
        Ok(WorkerHandle { command_queue, counters, thread: Some(thread), cpus })
    }

    /// The current geometry of the disk.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.supervisor.geometry(self.disk)
    }

    /// Calls `listener` from a thread of the engine each time the disk's size has changed. Only the first listener is kept.
    pub fn on_change(&self, listener: impl Fn() + Send + Sync + 'static) {
        self.supervisor.on_change(self.disk, Box::new(listener));
    }

    /// Becomes readable when the device has been released to the host for the first time. It can do no DMA by then.
    #[must_use]
    pub fn released(&self) -> BorrowedFd<'_> {
        self.supervisor.released.as_fd()
    }

    /// Starts a ring in the memory of the published table. The ring must be stopped.
    ///
    /// # Errors
    /// [`EngineError`] names the virtqueue and the reason. The ring stays stopped.
    pub fn start_ring(&self, ring: VringSetup) -> Result<(), EngineError> {
        let (worker, slot) = self.slot(ring.index)?;
        let ring = Box::new(ring);
        self.command(worker, |answer| WorkerCommand::Start(slot, ring, answer))?
    }

    /// Stops a ring once every request taken from it is complete, and returns the position for [`VringSetup::base`]. After
    /// `drain_timeout` the device is reset, and the requests fail. Returns `None` for a ring that is not started.
    ///
    /// # Errors
    /// [`EngineError::NoSuchRing`] or [`EngineError::WorkerGone`].
    pub fn stop_ring(&self, index: usize) -> Result<Option<u32>, EngineError> {
        let (worker, slot) = self.slot(index)?;
        let answer = self.workers[worker].command_queue.post(|answer| WorkerCommand::Stop(slot, answer));
        self.await_drained(worker, &answer, self.deadline(), &format!("stop virtqueue {index}"))
    }

    /// SET_VRING_ENABLE: no new requests are taken from a disabled ring. May precede the start; survives a stop.
    pub fn set_enabled(&self, index: usize, enabled: bool) {
        self.change(index, |slot, answer| WorkerCommand::Enable(slot, enabled, answer));
    }

    /// SET_VRING_CALL while running. The former eventfd is not signalled after this returns.
    pub fn set_call(&self, index: usize, call: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Call(slot, call, answer));
    }

    /// SET_VRING_ERR while running.
    pub fn set_err(&self, index: usize, err: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Err(slot, err, answer));
    }

    /// SET_VRING_KICK while running. A ring without a kick eventfd is polled.
    pub fn set_kick(&self, index: usize, kick: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Kick(slot, kick, answer));
    }

    /// SET_VRING_ADDR while running: see [`VringSetup::used_log`].
    pub fn set_used_log(&self, index: usize, used_log: Option<Gpa>) {
        self.change(index, |slot, answer| WorkerCommand::UsedLog(slot, used_log, answer));
    }

    /// Marks pages that are written in `logging` from now on, also for requests that are in flight. The former log is no longer
    /// used when this returns.
    pub fn set_logging(&self, logging: Option<&DirtyLogging>) {
        self.tell_all("log dirty pages", |answer| WorkerCommand::Log(logging.cloned(), answer));
    }

    /// Checks requests against `table` from now on. It must contain every region of the former table.
    pub fn publish(&self, table: Arc<MemTable>) {
        self.tell_all("publish memory", |answer| WorkerCommand::Publish(Arc::clone(&table), answer));
    }

    /// Sends a command to all workers and waits for the replies.
    fn tell_all(&self, action: &str, command: impl Fn(Sender<()>) -> WorkerCommand) {
        let post = |handle: &WorkerHandle| handle.command_queue.post(&command);
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        for (worker, answer) in answers.iter().enumerate() {
            if answer.recv().is_err() {
                log::error!("{action}: {}", EngineError::WorkerGone(worker));
            }
        }
    }

    /// Checks requests against `table`, which lacks `removed`, from now on. When this returns, no command in flight accesses
    /// `removed`. Other requests continue. Rings in removed memory must have been stopped; a running one fails.
    ///
    /// # Errors
    /// [`EngineError::WorkerGone`]. Commands of that worker may still be in flight.
    pub fn remove_memory(&self, table: Arc<MemTable>, removed: &[Span<Gpa>]) -> Result<(), EngineError> {
        let removed: Arc<[_]> = removed.into();
        let post = |handle: &WorkerHandle| {
            handle
                .command_queue
                .post(|answer| WorkerCommand::RemoveMemory(Arc::clone(&table), Arc::clone(&removed), answer))
        };
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        let deadline = self.deadline();
        for (worker, answer) in answers.iter().enumerate() {
            self.await_drained(worker, answer, deadline, "remove memory")?;
        }
        Ok(())
    }

    /// Counters since start. Recoveries and aborts are those of the whole device.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.handle().statistics()
    }

    /// Completes or fails all requests in flight, and stops the workers. The last engine of a device shuts it down.
    pub fn shut_down(self) {
        drop(self);
    }
}
