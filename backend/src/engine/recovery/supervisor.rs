//! Owns the driver, and resets and recovers the device for all workers: it takes their device queues and gives them new ones.
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
use crate::sync::mpsc::Sender;
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
}

/// Owner of the driver. See the top of this file.
pub(in crate::engine) struct DeviceSupervisor {
    device: Mutex<SupervisedDevice>,
    command_queues: Mutex<Vec<Arc<CommandQueue>>>,
    reports: Arc<OverdueReports>,
    /// Signalled when the device has been released.
    pub(in crate::engine) released: OwnedFd,
    /// The disk's geometry. Its size is also in `live`, for the workers.
    geometry: Mutex<Geometry>,
    live: Arc<LiveGeometry>,
    size_listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
    pub(in crate::engine) recoveries: AtomicU64,
    pub(in crate::engine) aborts: AtomicU64,
}

impl DeviceSupervisor {
    pub(in crate::engine) fn new(
        driver: Box<dyn Driver>,
        live: Arc<LiveGeometry>,
        reports: Arc<OverdueReports>,
        released: OwnedFd,
    ) -> Self {
        Self {
            geometry: Mutex::new(driver.geometry().clone()),
            live,
            size_listener: OnceLock::new(),
            device: Mutex::new(SupervisedDevice { driver, state: State::Up, last_error: String::new() }),
            released,
            command_queues: Mutex::default(),
            reports,
            recoveries: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }
    }

    /// Adds a worker.
    pub(in crate::engine) fn add_worker(&self, command_queue: Arc<CommandQueue>) {
        self.command_queues.lock().unwrap_or_else(PoisonError::into_inner).push(command_queue);
    }

    pub(in crate::engine) fn on_change(&self, listener: Box<dyn Fn() + Send + Sync>) {
        if self.size_listener.set(listener).is_err() {
            log::warn!("a listener for the disk size is set already; the new one is ignored");
        }
    }

    /// The disk's geometry. Unlike [`Self::lock`] this does not wait for the device.
    pub(in crate::engine) fn geometry(&self) -> Geometry {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adopts the driver's geometry. Only the size may have changed.
    fn update_geometry(&self, device: &SupervisedDevice) {
        let blocks = device.driver.geometry().blocks;
        let geometry = &mut *self.geometry.lock().unwrap_or_else(PoisonError::into_inner);
        if geometry.blocks == blocks {
            return;
        }
        LOG.warn(|| format!("the disk has {blocks} blocks now, {} before", geometry.blocks));
        geometry.blocks = blocks;
        self.live.blocks.store(blocks, Ordering::Relaxed);
        if let Some(listener) = self.size_listener.get() {
            listener();
        }
    }

    /// Handles the device's asynchronous events.
    pub(in crate::engine) fn handle_events(&self) {
        let mut device = self.lock();
        if device.state != State::Up {
            return;
        }
        match device.driver.handle_events() {
            Ok(()) => self.update_geometry(&device),
            Err(error) => {
                LOG.error(|| format!("{error:#}; resetting it"));
                self.reset(&mut device, InflightPolicy::Resubmit);
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
    /// write to its buffers.
    pub(in crate::engine) fn reset(&self, device: &mut SupervisedDevice, policy: InflightPolicy) {
        if device.state != State::Up {
            return;
        }
        self.drop_queues();
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        match device.driver.recover() {
            Ok(queues) => {
                self.update_geometry(device);
                self.adopt_queues(queues, policy);
            }
            Err(error) => {
                LOG.error(|| format!("the device did not come back: {error:#}; requests fail until it does"));
                device.state = State::Down;
                self.adopt_queues(Vec::new(), InflightPolicy::Fail);
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
                self.update_geometry(&device);
                self.adopt_queues(queues, InflightPolicy::Fail);
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
        self.adopt_queues(Vec::new(), InflightPolicy::Fail);
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
            self.reset(&mut device, InflightPolicy::Resubmit);
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
        self.reset(&mut device, InflightPolicy::Resubmit);
    }

    /// Resets a device that has not completed aborted commands.
    pub(in crate::engine) fn reset_after_abort(&self, recoveries: u64) {
        let Some(mut device) = self.lock_if_current(recoveries) else { return };
        LOG.error(|| "aborted commands have not completed; resetting the device".to_owned());
        self.reset(&mut device, InflightPolicy::Resubmit);
    }

    /// Takes the queues from the workers. Reports about them are obsolete then. One that was taken already fails the check of
    /// `recoveries`.
    pub(super) fn drop_queues(&self) {
        self.command_all(|_, answer| WorkerCommand::DropQueue(answer));
        self.reports.clear();
    }

    fn adopt_queues(&self, queues: Vec<Box<dyn Queue>>, policy: InflightPolicy) {
        let mut queues = queues.into_iter();
        self.command_all(|_, answer| WorkerCommand::AdoptQueue(queues.next(), policy, answer));
    }

    /// Sends a command to every worker and waits for the replies, which come at once.
    fn command_all(&self, mut command: impl FnMut(usize, Sender<()>) -> WorkerCommand) {
        let command_queues = self.command_queues.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let posts = command_queues.iter().enumerate();
        let answers: Vec<_> = posts.map(|(n, command_queue)| command_queue.post(|answer| command(n, answer))).collect();
        for (worker, answer) in answers.iter().enumerate() {
            if answer.recv().is_err() {
                log::error!("{}", EngineError::WorkerGone(worker));
            }
        }
    }
}
