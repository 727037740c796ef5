//! The block engine: requests from vrings become commands for a device queue, completions become used entries. Workers own
//! everything they touch; [`Engine`] is the control thread's handle on them.
//!
//! ```text
//!  control thread            worker n (one thread; virtqueues n, n + N, n + 2N …)
//!  Engine --- command_queue ---->  Worker -> DataPath::{reap, submit} -> Chain -> request -> InflightRequest -> driver::Queue
//!         <-- answer -----          <- Virtqueue::publish  <-  answer  <- complete <----------
//! ```
//!
//! Workers share no lock and take none per request. The control thread waits for the reply to each command, so when a method
//! returns, the worker has done it.
//!
//! | door | holds |
//! |---|---|
//! | [`virtqueue`] | how rings lie in memory: split, packed, chains, the common shape of a request |
//! | [`request`] | from a chain to a checked block request |
//! | `data_path/` | one worker's requests in flight, bounce buffers and cache maintenance |
//! | `worker/` | the thread, and the commands it takes |
//! | `recovery/` | time-outs, reset and recovery of the device |

mod data_path;
mod error;
pub mod guest_memory;
mod inflight_policy;
mod live_geometry;
mod recovery;
pub mod request;
mod setup;
mod statistics;
pub mod virtqueue;
mod vring;
mod worker;
mod worker_control;
mod write_cache;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

pub use error::EngineError;
pub use live_geometry::LiveGeometry;
pub use recovery::WatchdogOptions;
pub use setup::{Options, VringSetup};
pub use statistics::Statistics;
pub use virtqueue::Layout;

use crate::addr::{Gpa, Span};
use crate::driver::{Driver, Geometry, Queue};
use crate::hardware::AddressSpace;
use crate::memory::MemTable;
use data_path::{Bounce, CacheMaintenance, DataPath, WorkerLayout};
use recovery::{DeviceSupervisor, OverdueReports, Watchdog};
use request::Disk;
use statistics::Counters;
use worker::{CommandQueue, Worker, WorkerCommand};

/// The control thread's view of one worker.
struct Handle {
    command_queue: Arc<CommandQueue>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

/// All workers, and the device.
///
/// A virtqueue is served while it is both started and enabled. Enabled is a property of the virtqueue, not of the ring: it
/// is false at first, may be set before the start, and outlives a stop (vhost-user: "Ring states").
pub struct Engine {
    workers: Vec<Handle>,
    supervisor: Arc<DeviceSupervisor>,
    /// `None` only at the end.
    watchdog: Option<Watchdog>,
    options: Options,
    live: Arc<LiveGeometry>,
}

impl Engine {
    /// Starts one worker per queue of `driver`; virtqueue n is served by worker n mod workers.
    ///
    /// # Errors
    /// [`EngineError::NoQueues`], [`EngineError::Bounce`] or [`EngineError::Start`]; the device has been shut down then.
    pub fn start(
        mut driver: Box<dyn Driver>,
        space: &Arc<dyn AddressSpace>,
        options: Options,
    ) -> Result<Self, EngineError> {
        let geometry = driver.geometry().clone();
        let queues = driver.take_queues();
        let reports = Arc::new(OverdueReports::new().map_err(EngineError::Watchdog)?);
        let released = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| EngineError::Watchdog(error.into()))?;
        let live = Arc::new(LiveGeometry::of(&geometry));
        let supervisor = Arc::new(DeviceSupervisor::new(driver, Arc::clone(&live), Arc::clone(&reports), released));
        let watchdog =
            Watchdog::start(Arc::clone(&supervisor), reports, options.watch).map_err(EngineError::Watchdog)?;
        let mut engine = Self {
            workers: Vec::with_capacity(queues.len()),
            supervisor,
            watchdog: Some(watchdog),
            live,
            // No virtqueue exists until every worker does.
            options: Options { rings: 0, ..options },
        };
        if queues.is_empty() {
            return Err(EngineError::NoQueues);
        }
        let workers = queues.len();
        for (worker, queue) in queues.into_iter().enumerate() {
            let slots = options.rings.saturating_sub(worker).div_ceil(workers);
            let handle = engine.hire(WorkerLayout { worker, workers, slots }, queue, space)?;
            engine.workers.push(handle);
        }
        engine.options = options;
        Ok(engine)
    }

    fn hire(
        &self,
        post: WorkerLayout,
        queue: Box<dyn Queue>,
        space: &Arc<dyn AddressSpace>,
    ) -> Result<Handle, EngineError> {
        let number = post.worker;
        let bounce = Bounce::new(space).map_err(|source| EngineError::Bounce { worker: number, source })?;
        let failed = |source| EngineError::Start { worker: number, source };
        let command_queue = Arc::new(CommandQueue::new().map_err(failed)?);
        let counters = Arc::new(Counters::default());
        let caches = CacheMaintenance::new(space.caches(), Arc::clone(&counters));
        let disk = Disk::new(&self.geometry(), Arc::clone(&self.live));
        let path = DataPath::new(&post, disk, bounce, caches, Arc::clone(&counters));
        let clock = self.watchdog.as_ref().expect("there until the end").clock();
        let worker =
            Worker::new(path, queue, Arc::clone(&command_queue), (self.options.spin, clock)).map_err(failed)?;
        self.supervisor.enlist(Arc::clone(&command_queue));
        let thread = std::thread::Builder::new()
            .name(format!("vdv-worker-{number}"))
            .spawn(move || worker.run())
            .map_err(failed)?;
        Ok(Handle { command_queue, counters, thread: Some(thread) })
    }

    /// What the disk is now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.supervisor.geometry()
    }

    /// Calls `tell`, from a thread of the engine, each time the disk's size has changed. Only the first listener is kept.
    pub fn on_change(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.supervisor.on_change(Box::new(tell));
    }

    /// Readable once the host has got the device back for the first time; the device reaches no memory then.
    #[must_use]
    pub fn released(&self) -> BorrowedFd<'_> {
        self.supervisor.released.as_fd()
    }

    /// Starts serving a ring against the published table. Replaces nothing: the ring must be stopped.
    ///
    /// # Errors
    /// [`EngineError`] names the virtqueue and what is wrong with it; it stays stopped.
    pub fn start_ring(&self, ring: VringSetup) -> Result<(), EngineError> {
        let (worker, slot) = self.slot(ring.index)?;
        let ring = Box::new(ring);
        self.command(worker, |answer| WorkerCommand::Start(slot, ring, answer))?
    }

    /// Completes what was taken (or, past `patience`, resets the device and fails it), stops the ring, and returns where to
    /// go on, as [`VringSetup::base`] has it. A ring that was never started returns None.
    ///
    /// # Errors
    /// [`EngineError::NoSuchRing`] or [`EngineError::WorkerGone`].
    pub fn stop_ring(&self, index: usize) -> Result<Option<u32>, EngineError> {
        let (worker, slot) = self.slot(index)?;
        let answer = self.workers[worker].command_queue.post(|answer| WorkerCommand::Stop(slot, answer));
        self.await_drained(worker, &answer, self.deadline(), &format!("virtqueue {index} stops"))
    }

    /// SET_VRING_ENABLE: a disabled ring takes no new requests. May come before the start, and outlives a stop.
    pub fn set_enabled(&self, index: usize, enabled: bool) {
        self.change(index, |slot, answer| WorkerCommand::Enable(slot, enabled, answer));
    }

    /// SET_VRING_CALL while running; the former eventfd is not signalled any more when this returns.
    pub fn set_call(&self, index: usize, call: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Call(slot, call, answer));
    }

    /// SET_VRING_ERR while running.
    pub fn set_err(&self, index: usize, err: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Err(slot, err, answer));
    }

    /// SET_VRING_KICK while running; without one the ring is polled.
    pub fn set_kick(&self, index: usize, kick: Option<OwnedFd>) {
        self.change(index, |slot, answer| WorkerCommand::Kick(slot, kick, answer));
    }

    /// The table that requests are checked against from now on; it only gained regions.
    pub fn publish(&self, table: Arc<MemTable>) {
        let post =
            |handle: &Handle| handle.command_queue.post(|answer| WorkerCommand::Publish(Arc::clone(&table), answer));
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        for (worker, answer) in answers.iter().enumerate() {
            if answer.recv().is_err() {
                log::error!("publish memory: {}", EngineError::WorkerGone(worker));
            }
        }
    }

    /// The table that requests are checked against from now on; when this returns, no command in flight touches `removed`.
    /// Requests elsewhere go on. Rings that live in removed memory must have been stopped; one that was not is broken.
    ///
    /// # Errors
    /// [`EngineError::WorkerGone`]; commands of that worker may then still be in flight.
    pub fn withdraw(&self, table: Arc<MemTable>, removed: &[Span<Gpa>]) -> Result<(), EngineError> {
        let removed: Arc<[_]> = removed.into();
        let post = |handle: &Handle| {
            handle
                .command_queue
                .post(|answer| WorkerCommand::Withdraw(Arc::clone(&table), Arc::clone(&removed), answer))
        };
        let answers: Vec<_> = self.workers.iter().map(post).collect();
        let deadline = self.deadline();
        for (worker, answer) in answers.iter().enumerate() {
            self.await_drained(worker, answer, deadline, "memory is withdrawn")?;
        }
        Ok(())
    }

    /// Counters since start.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let DeviceSupervisor { recoveries, aborts, .. } = &*self.supervisor;
        let mut sum = Statistics { recoveries: count(recoveries), aborts: count(aborts), ..Statistics::default() };
        self.workers.iter().for_each(|handle| handle.counters.add_to(&mut sum));
        sum
    }

    /// Stops all workers, completes or fails what is in flight, and shuts the device down.
    pub fn shut_down(self) {
        drop(self);
    }
}
