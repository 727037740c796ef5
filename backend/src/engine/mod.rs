//! The data path: rings in, commands out, completions back. Workers own everything they touch; the [`Engine`] is the
//! control thread's handle on them.
//!
//! ```text
//!  control thread            worker n (one thread; virtqueues n, n + N, n + 2N …)
//!  Engine --- mailbox ---->  Worker -> Path::{reap, submit} -> Chain -> request -> Flight -> driver::Queue
//!         <-- answer -----          <- Virtqueue::publish  <-  answer  <- complete <----------
//! ```
//!
//! A worker shares no lock with another and takes none per request. The control thread waits for each order's answer, so
//! when a method returns, the worker has done it. When commands do not come back in time, the device is reset under all
//! workers at once: every request in flight is answered with an error, and all go on with fresh queues.

mod bounce;
mod cache_switch;
mod caches;
pub mod chain;
mod changing;
mod control;
mod flights;
mod guard;
pub mod guest;
mod keeper;
mod mailbox;
pub mod packed;
mod pass;
pub mod ranges;
pub mod request;
mod ring;
mod seat;
pub mod split;
mod statistics;
pub mod ticket;
pub mod usual;
pub mod virtqueue;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

pub use changing::Changing;
pub use guard::Watch;
pub use statistics::Statistics;
pub use virtqueue::Layout;

use crate::addr::{Gpa, Span};
use crate::driver::{Driver, Geometry, Queue};
use crate::hardware::{AddressSpace, MapError};
use crate::memory::MemTable;
use bounce::Bounce;
use caches::Caches;
use guard::{Alarm, Guard};
use keeper::Keeper;
use mailbox::{Mailbox, Order};
use pass::Path;
use request::Disk;
use seat::Post;
use statistics::Counters;
use worker::Worker;

/// What a started ring is made of (virtio 1.2 §2.7, §2.8). All three areas have been found in the memory table.
pub struct RingSetup {
    /// Which virtqueue.
    pub index: usize,
    /// VIRTIO_F_RING_PACKED acked, or not.
    pub layout: Layout,
    /// Number of descriptors; see [`Layout::allows`].
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: Span<Gpa>,
    /// Available ring, or the driver's event suppression structure.
    pub avail: Span<Gpa>,
    /// Used ring, or the device's event suppression structure. A split ring's used index goes on from what stands there.
    pub used: Span<Gpa>,
    /// Where to go on (SET_VRING_BASE). Split: first avail index to take. Packed: next available descriptor and next used
    /// one, 15 bits each with their wrap counters on top (vhost-user: "Vring descriptor indices for packed virtqueues").
    pub base: u32,
    /// VIRTIO_RING_F_EVENT_IDX acked.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC acked.
    pub indirect: bool,
    /// Signalled by the driver; without it the ring is polled.
    pub kick: Option<OwnedFd>,
    /// Signalled to the driver.
    pub call: Option<OwnedFd>,
    /// Signalled when the ring is broken.
    pub err: Option<OwnedFd>,
}

/// How the engine behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of virtqueues offered.
    pub rings: usize,
    /// How long a worker polls without finding work before it sleeps.
    pub spin: Duration,
    /// How long commands in flight may take to finish when a ring stops or memory goes away, before the device is reset.
    pub patience: Duration,
    /// How long the device is waited for.
    pub watch: Watch,
}

/// Why the engine, or a ring, could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The driver has no queues to give.
    #[error("the device has no queue to serve virtqueues with")]
    NoQueues,
    /// The virtqueue does not exist.
    #[error("virtqueue {index} of {rings}: no such virtqueue")]
    NoSuchRing {
        /// Asked for.
        index: usize,
        /// Number offered.
        rings: usize,
    },
    /// The virtqueue is being served already.
    #[error("virtqueue {0}: running already; stop it first (GET_VRING_BASE)")]
    RingRunning(usize),
    /// Not a size this device serves.
    #[error("virtqueue {index}: the size of a {layout} ring is {}, not {size}", layout.sizes())]
    RingSize {
        /// Which virtqueue.
        index: usize,
        /// Asked for.
        size: u16,
        /// Split or packed.
        layout: Layout,
    },
    /// A place to go on that the ring does not have.
    #[error("virtqueue {index}: base {base:#x} is no place in a ring of {size}")]
    RingBase {
        /// Which virtqueue.
        index: usize,
        /// Number of descriptors.
        size: u16,
        /// Asked for.
        base: u32,
    },
    /// An area is too short, misaligned, or not in one region of guest memory.
    #[error("virtqueue {index}: {name} at {span}: needs {bytes} bytes in one memory region, aligned to {alignment}")]
    RingArea {
        /// Which virtqueue.
        index: usize,
        /// Which area.
        name: &'static str,
        /// Where it was said to be.
        span: Span<Gpa>,
        /// Bytes needed.
        bytes: u64,
        /// Alignment needed, bytes.
        alignment: u64,
    },
    /// The kick eventfd cannot be waited for.
    #[error("virtqueue {index}: watch its kick eventfd: {source}")]
    Kick {
        /// Which virtqueue.
        index: usize,
        /// The errno.
        source: io::Error,
    },
    /// No memory for bounce buffers.
    #[error("bounce buffer of worker {worker}: {source}")]
    Bounce {
        /// Which worker.
        worker: usize,
        /// Why.
        source: MapError,
    },
    /// A worker could not be started.
    #[error("start worker {worker}: {source}")]
    Start {
        /// Which worker.
        worker: usize,
        /// The errno.
        source: io::Error,
    },
    /// The guard could not be started.
    #[error("start the guard: {0}")]
    Guard(
        /// The errno.
        #[source]
        io::Error,
    ),
    /// The write cache cannot be switched.
    #[error("switch the write cache {}: {source:#}", if *.on { "on" } else { "off" })]
    WriteCache {
        /// To which state.
        on: bool,
        /// Why not.
        source: anyhow::Error,
    },
    /// A worker has ended by a bug; its log line tells where.
    #[error("worker {0} has ended")]
    WorkerGone(usize),
}

/// The control thread's view of one worker.
struct Handle {
    mailbox: Arc<Mailbox>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

/// All workers, and the device.
///
/// A virtqueue is served while it is both started and enabled. Enabled is a property of the virtqueue, not of the ring: it
/// is false at first, may be set before the start, and outlives a stop (vhost-user: "Ring states").
pub struct Engine {
    workers: Vec<Handle>,
    keeper: Arc<Keeper>,
    /// `None` only at the end.
    guard: Option<Guard>,
    options: Options,
    changing: Arc<Changing>,
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
        let alarm = Arc::new(Alarm::new().map_err(EngineError::Guard)?);
        let released = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| EngineError::Guard(error.into()))?;
        let changing = Arc::new(Changing::of(&geometry));
        let keeper = Arc::new(Keeper::new(driver, Arc::clone(&changing), Arc::clone(&alarm), released));
        let guard = Guard::start(Arc::clone(&keeper), alarm, options.watch).map_err(EngineError::Guard)?;
        let mut engine = Self {
            workers: Vec::with_capacity(queues.len()),
            keeper,
            guard: Some(guard),
            changing,
            // No virtqueue exists until every worker does.
            options: Options { rings: 0, ..options },
        };
        if queues.is_empty() {
            return Err(EngineError::NoQueues);
        }
        let workers = queues.len();
        for (worker, queue) in queues.into_iter().enumerate() {
            let seats = options.rings.saturating_sub(worker).div_ceil(workers);
            let handle = engine.hire(Post { worker, workers, seats }, queue, space)?;
            engine.workers.push(handle);
        }
        engine.options = options;
        Ok(engine)
    }

    fn hire(&self, post: Post, queue: Box<dyn Queue>, space: &Arc<dyn AddressSpace>) -> Result<Handle, EngineError> {
        let number = post.worker;
        let bounce = Bounce::new(space).map_err(|source| EngineError::Bounce { worker: number, source })?;
        let failed = |source| EngineError::Start { worker: number, source };
        let mailbox = Arc::new(Mailbox::new().map_err(failed)?);
        let counters = Arc::new(Counters::default());
        let caches = Caches::new(space.caches(), Arc::clone(&counters));
        let disk = Disk::new(&self.geometry(), Arc::clone(&self.changing));
        let path = Path::new(&post, disk, bounce, caches, Arc::clone(&counters));
        let sentry = self.guard.as_ref().expect("there until the end").sentry();
        let worker = Worker::new(path, queue, Arc::clone(&mailbox), (self.options.spin, sentry)).map_err(failed)?;
        self.keeper.enlist(Arc::clone(&mailbox));
        let thread = std::thread::Builder::new()
            .name(format!("vdv-worker-{number}"))
            .spawn(move || worker.run())
            .map_err(failed)?;
        Ok(Handle { mailbox, counters, thread: Some(thread) })
    }

    /// What the disk is now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.keeper.geometry()
    }

    /// Has `tell` called, from a thread of the engine's, each time the disk's size has changed. Only the first one is kept.
    pub fn on_change(&self, tell: impl Fn() + Send + Sync + 'static) {
        self.keeper.on_change(Box::new(tell));
    }

    /// Readable from when the host has got the device back for the first time: it reaches no memory then.
    #[must_use]
    pub fn released(&self) -> BorrowedFd<'_> {
        self.keeper.released.as_fd()
    }

    /// Starts serving a ring against the published table. Replaces nothing: the ring must be stopped.
    ///
    /// # Errors
    /// [`EngineError`] names the virtqueue and what is wrong with it; it stays stopped.
    pub fn start_ring(&self, ring: RingSetup) -> Result<(), EngineError> {
        let (worker, seat) = self.seat(ring.index)?;
        let ring = Box::new(ring);
        self.order(worker, |answer| Order::Start(seat, ring, answer))?
    }

    /// Completes what was taken (or, past `patience`, resets the device and fails it), stops the ring, and returns where to
    /// go on, as [`RingSetup::base`] has it. A ring that was never started returns None.
    ///
    /// # Errors
    /// [`EngineError::NoSuchRing`] or [`EngineError::WorkerGone`].
    pub fn stop_ring(&self, index: usize) -> Result<Option<u32>, EngineError> {
        let (worker, seat) = self.seat(index)?;
        let answer = self.workers[worker].mailbox.post(|answer| Order::Stop(seat, answer));
        self.await_drained(worker, &answer, self.deadline(), &format!("virtqueue {index} stops"))
    }

    /// SET_VRING_ENABLE: a disabled ring takes no new requests. May come before the start, and outlives a stop.
    pub fn set_enabled(&self, index: usize, enabled: bool) {
        self.change(index, |seat, answer| Order::Enable(seat, enabled, answer));
    }

    /// SET_VRING_CALL while running; the former eventfd is not signalled any more when this returns.
    pub fn set_call(&self, index: usize, call: Option<OwnedFd>) {
        self.change(index, |seat, answer| Order::Call(seat, call, answer));
    }

    /// SET_VRING_ERR while running.
    pub fn set_err(&self, index: usize, err: Option<OwnedFd>) {
        self.change(index, |seat, answer| Order::Err(seat, err, answer));
    }

    /// SET_VRING_KICK while running; without one the ring is polled.
    pub fn set_kick(&self, index: usize, kick: Option<OwnedFd>) {
        self.change(index, |seat, answer| Order::Kick(seat, kick, answer));
    }

    /// The table that requests are checked against from now on; it only gained regions.
    pub fn publish(&self, table: Arc<MemTable>) {
        let post = |handle: &Handle| handle.mailbox.post(|answer| Order::Publish(Arc::clone(&table), answer));
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
            handle.mailbox.post(|answer| Order::Withdraw(Arc::clone(&table), Arc::clone(&removed), answer))
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
        let Keeper { recoveries, aborts, .. } = &*self.keeper;
        let mut sum = Statistics { recoveries: count(recoveries), aborts: count(aborts), ..Statistics::default() };
        self.workers.iter().for_each(|handle| handle.counters.add_to(&mut sum));
        sum
    }

    /// Stops all workers, completes or fails what is in flight, and shuts the device down.
    pub fn shut_down(self) {
        drop(self);
    }
}
