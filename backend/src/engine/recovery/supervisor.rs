//! Owns the driver, and resets and recovers the device for all workers of all disks: it takes their device queues and gives them
//! new ones.
//! It holds the driver's lock meanwhile, so the control thread and the watchdog exclude each other. Workers never take that
//! lock.
//!
//! ```text
//!            reset (DropQueue, driver, AdoptQueue)            recover (driver, AdoptQueue)
//!   Up -----------------------------------------------> Up ; Down --------------------------> Up
//!      -- the reset fails ----------------> Down
//!      -- the host requests the device ---> Down, released: recover reacquires it when the host has returned it
//! ```

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use super::overdue_reports::OverdueReports;
use crate::driver::{CommandId, Driver, Geometry, Queue};
use crate::engine::error::EngineError;
use crate::engine::inflight_policy::InflightPolicy;
use crate::engine::live_geometry::LiveGeometry;
use crate::engine::worker::{CommandQueue, WorkerCommand};
use crate::eventfd::signal;
use crate::rate_limited_log::{Limit, SharedLog};
use crate::sync::mpsc::{Sender, channel};
use crate::sync::{Mutex, MutexGuard};

/// A device that fails again and again.
static LOG: SharedLog = SharedLog::with_limit(module_path!(), Limit::CONNECTIONS);

/// With more overdue commands than this the device is reset at once: controllers execute few Aborts concurrently (NVMe 2.0
/// §5.1, ACL).
const MAX_ABORTS: usize = 4;

/// See the diagram above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Up,
    Down,
    /// Another process drives the device, which may come back; see `hand_over`.
    Lent,
    /// Another process owns the device, or it has been shut down.
    Left,
}

/// The driver, and the state that its lock protects.
pub(in crate::engine) struct SupervisedDevice {
    pub(in crate::engine) driver: Box<dyn Driver>,
    pub(super) state: State,
    /// The error of the last failed recovery, to log a repeated one at debug level.
    last_error: String,
    /// The disks whose user wants no volatile write cache, which all of them share.
    pub(in crate::engine) write_through: Vec<bool>,
}

/// What is known of one disk without the driver's lock.
struct SupervisedDisk {
    /// Its size is also in `live`, for the workers.
    geometry: Mutex<Geometry>,
    live: Arc<LiveGeometry>,
    size_listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// A worker, and the disk that it serves.
struct SupervisedWorker {
    disk: usize,
    /// `None` when the disk is no longer served.
    command_queue: Option<Arc<CommandQueue>>,
}

/// Owner of the driver. See the top of this file.
pub(in crate::engine) struct DeviceSupervisor {
    device: Mutex<SupervisedDevice>,
    /// In the order of the driver's queues.
    workers: Mutex<Vec<SupervisedWorker>>,
    pub(in crate::engine) reports: Arc<OverdueReports>,
    /// Signalled when the device has been released.
    pub(in crate::engine) released: OwnedFd,
    disks: Vec<SupervisedDisk>,
    pub(in crate::engine) recoveries: AtomicU64,
    pub(in crate::engine) aborts: AtomicU64,
}

impl DeviceSupervisor {
    pub(in crate::engine) fn new(driver: Box<dyn Driver>, reports: Arc<OverdueReports>, released: OwnedFd) -> Self {
        let disk = |geometry: &Geometry| SupervisedDisk {
            geometry: Mutex::new(geometry.clone()),
            live: Arc::new(LiveGeometry::of(geometry)),
            size_listener: OnceLock::new(),
        };
        let disks: Vec<_> = driver.geometries().iter().map(disk).collect();
        let write_through = driver.geometries().iter().map(|geometry| !geometry.cache_on).collect();
        let device = SupervisedDevice { driver, state: State::Up, last_error: String::new(), write_through };
        Self {
            device: Mutex::new(device),
            disks,
            released,
            workers: Mutex::default(),
            reports,
            recoveries: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }
    }

    /// Adds a worker, which has the next one of the driver's queues.
    pub(in crate::engine) fn add_worker(&self, disk: usize, command_queue: Arc<CommandQueue>) {
        self.workers().push(SupervisedWorker { disk, command_queue: Some(command_queue) });
    }

    /// Forgets the workers of a disk, which are about to end: they get no more commands, and no queues.
    pub(in crate::engine) fn retire(&self, disk: usize) {
        let _no_reset = self.lock();
        let mut workers = self.workers();
        workers.iter_mut().filter(|worker| worker.disk == disk).for_each(|worker| worker.command_queue = None);
    }

    /// The workers of all disks.
    pub(in crate::engine) fn command_queues(&self) -> Vec<Arc<CommandQueue>> {
        self.workers().iter().filter_map(|worker| worker.command_queue.clone()).collect()
    }

    fn workers(&self) -> MutexGuard<'_, Vec<SupervisedWorker>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::engine) fn on_change(&self, disk: usize, listener: Box<dyn Fn() + Send + Sync>) {
        if self.disks[disk].size_listener.set(listener).is_err() {
            log::warn!("a listener for the disk size is set already; the new one is ignored");
        }
    }

    /// The disk's geometry. Unlike [`Self::lock`] this does not wait for the device.
    pub(in crate::engine) fn geometry(&self, disk: usize) -> Geometry {
        self.disks[disk].geometry.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The part of the disk's geometry that its workers read.
    pub(in crate::engine) fn live(&self, disk: usize) -> Arc<LiveGeometry> {
        Arc::clone(&self.disks[disk].live)
    }

    /// Number of disks.
    pub(in crate::engine) fn disks(&self) -> usize {
        self.disks.len()
    }

    /// Adopts the driver's geometries. Only the sizes may have changed.
    fn update_geometries(&self, device: &SupervisedDevice) {
        for (disk, now) in self.disks.iter().zip(device.driver.geometries()) {
            let geometry = &mut *disk.geometry.lock().unwrap_or_else(PoisonError::into_inner);
            if geometry.blocks == now.blocks {
                continue;
            }
            let before = geometry.blocks;
            LOG.warn(|| format!("the disk {} has {} blocks now, {before} before", now.serial, now.blocks));
            geometry.blocks = now.blocks;
            disk.live.blocks.store(now.blocks, Ordering::Relaxed);
            if let Some(listener) = disk.size_listener.get() {
                listener();
            }
        }
    }

    /// Handles the device's asynchronous events.
    pub(in crate::engine) fn handle_events(&self) {
        let mut device = self.lock();
        if device.state != State::Up {
            return;
        }
        match device.driver.handle_events() {
            Ok(()) => self.update_geometries(&device),
            Err(error) => {
                LOG.error(|| format!("{error:#}; resetting it"));
                self.reset(&mut device, None);
            }
        }
    }

    /// Locks the driver. Queues are neither dropped nor replaced while the guard is held.
    pub(in crate::engine) fn lock(&self) -> MutexGuard<'_, SupervisedDevice> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the device is down.
    pub(in crate::engine) fn is_down(&self) -> bool {
        self.lock().state == State::Down
    }

    /// True if the device has to be asked for asynchronous events.
    pub(in crate::engine) fn is_polled(&self) -> bool {
        self.lock().driver.is_polled()
    }

    /// The state; `None` while the device is being reset or asked.
    pub(super) fn state_now(&self) -> Option<State> {
        self.device.try_lock().ok().map(|device| device.state)
    }

    /// The same, without waiting for a reset: true if no reset is in progress and the device is down.
    pub(in crate::engine) fn is_known_to_be_down(&self) -> bool {
        self.state_now() == Some(State::Down)
    }

    /// Resets the device for all workers. No request in flight is completed before the reset, because the device may still
    /// write to its buffers. Those of the disk `failing` fail then, all others are submitted again.
    pub(in crate::engine) fn reset(&self, device: &mut SupervisedDevice, failing: Option<usize>) {
        self.reset_and(device, |disk| match failing {
            Some(failing) if failing == disk => InflightPolicy::Fail,
            _ => InflightPolicy::Resubmit,
        });
    }

    /// The same, of a device that has done nothing wrong: a ring is to have nothing in flight.
    pub(in crate::engine) fn reset_without_blame(&self, device: &mut SupervisedDevice) {
        self.reset_and(device, |_| InflightPolicy::Continue);
    }

    fn reset_and(&self, device: &mut SupervisedDevice, policy: impl Fn(usize) -> InflightPolicy) {
        if device.state != State::Up {
            return;
        }
        self.drop_queues();
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        match device.driver.recover() {
            Ok(queues) => {
                self.update_geometries(device);
                self.adopt_queues(queues, policy);
            }
            Err(error) => {
                LOG.error(|| format!("the device did not come back: {error:#}; requests fail until it does"));
                device.state = State::Down;
                self.adopt_queues(Vec::new(), |_| InflightPolicy::Fail);
            }
        }
    }

    /// Tries to recover a device that is down. Requests fail meanwhile. Returns true if the device may be retried at equal
    /// intervals: it is up again, or merely released.
    pub(in crate::engine) fn recover(&self) -> bool {
        let mut device = self.lock();
        if device.state != State::Down {
            return true;
        }
        match device.driver.recover() {
            Ok(queues) => {
                LOG.warn(|| "the device is back; requests are served again".to_owned());
                device.state = State::Up;
                self.update_geometries(&device);
                self.adopt_queues(queues, |_| InflightPolicy::Fail);
            }
            Err(error) => {
                let why = format!("{error:#}");
                if device.last_error == why {
                    log::debug!("the device is still away: {why}");
                } else {
                    LOG.info(|| format!("the device is still away: {why}"));
                }
                device.last_error = why;
            }
        }
        device.driver.is_released()
    }

    /// Releases the device to the host. Every request fails until the device can be reacquired.
    pub(in crate::engine) fn release(&self) {
        let mut device = self.lock();
        if device.driver.is_released() || matches!(device.state, State::Lent | State::Left) {
            return;
        }
        log::error!("the host wants the device back; it is released, and every request fails until it returns");
        self.drop_queues();
        device.driver.release();
        device.state = State::Down;
        self.adopt_queues(Vec::new(), |_| InflightPolicy::Fail);
        signal(&self.released);
    }

    /// Locks the driver to act on a report made at `recoveries`. `None` if the device is down or has been reset since.
    fn lock_if_current(&self, recoveries: u64) -> Option<MutexGuard<'_, SupervisedDevice>> {
        let device = self.lock();
        let outdated = device.state != State::Up || self.recoveries.load(Ordering::SeqCst) != recoveries;
        (!outdated).then_some(device)
    }

    /// Resets the device if its status is fatal or cannot be read.
    pub(in crate::engine) fn check(&self, recoveries: u64) {
        let Some(mut device) = self.lock_if_current(recoveries) else { return };
        if let Err(error) = device.driver.check() {
            LOG.error(|| format!("{error:#}; resetting it, with commands in flight"));
            self.reset(&mut device, None);
        }
    }

    /// Aborts overdue commands. Resets the device if there are too many, or if Abort fails.
    pub(in crate::engine) fn abort(&self, commands: &[CommandId], recoveries: u64) {
        let Some(mut device) = self.lock_if_current(recoveries) else { return };
        LOG.warn(|| format!("{} commands are overdue: {commands:?}", commands.len()));
        if commands.len() <= MAX_ABORTS {
            self.aborts.fetch_add(commands.len() as u64, Ordering::Relaxed);
            match device.driver.abort(commands) {
                Ok(()) => return,
                Err(error) => LOG.error(|| format!("{error:#}")),
            }
        }
        self.reset(&mut device, None);
    }

    /// Resets a device that has not completed aborted commands.
    pub(in crate::engine) fn reset_after_abort(&self, recoveries: u64) {
        let Some(mut device) = self.lock_if_current(recoveries) else { return };
        LOG.error(|| "aborted commands have not completed; resetting the device".to_owned());
        self.reset(&mut device, None);
    }

    /// Takes the queues from the workers. Reports about them are obsolete then. One that was taken already fails the check of
    /// `recoveries`.
    pub(super) fn drop_queues(&self) {
        self.command_all(|_, answer| WorkerCommand::DropQueue(answer));
        self.reports.clear();
    }

    /// Gives each worker the next queue, or none if there are no more. The queue of a worker that has been retired is dropped.
    fn adopt_queues(&self, queues: Vec<Box<dyn Queue>>, policy: impl Fn(usize) -> InflightPolicy) {
        let mut queues = queues.into_iter();
        self.command_all(|disk, answer| {
            let queue = queues.next();
            debug_assert!(queue.as_ref().is_none_or(|queue| queue.disk() == disk), "in the order of the start");
            WorkerCommand::AdoptQueue(queue, policy(disk), answer)
        });
    }

    /// Sends a command to every worker and waits for the replies, which come at once and are dropped here.
    fn command_all<T>(&self, mut command: impl FnMut(usize, Sender<T>) -> WorkerCommand) {
        let post = |worker: &SupervisedWorker| {
            let (answer, reply) = channel();
            let command = command(worker.disk, answer);
            worker.command_queue.as_ref().map(|command_queue| {
                command_queue.push(command);
                reply
            })
        };
        let answers: Vec<_> = self.workers().iter().map(post).collect();
        for (worker, answer) in answers.iter().enumerate() {
            if answer.as_ref().is_some_and(|answer| answer.recv().is_err()) {
                log::error!("{}", EngineError::WorkerGone(worker));
            }
        }
    }
}
