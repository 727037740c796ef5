//! Owns the driver, and resets and recovers the device under all workers: it takes the device queues from them and gives
//! them new ones. It does so under the driver's lock, so the control thread and the watchdog never do it at the same time.
//! Workers never take that lock.
//!
//! ```text
//!            reset (HandBack, driver, Adopt)            recover (driver, Adopt)
//!   Up -----------------------------------------> Up ; Down ---------------------> Up
//!      -- the device does not come back --> Down
//!      -- the host wants it back ---------> Down, released: recover takes it again when the host has done with it
//! ```

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::overdue_reports::OverdueReports;
use crate::driver::{CommandId, Driver, Geometry, Queue};
use crate::engine::error::EngineError;
use crate::engine::inflight_policy::InflightPolicy;
use crate::engine::live_geometry::LiveGeometry;
use crate::engine::worker::{CommandQueue, WorkerCommand};
use crate::eventfd::signal;

/// With more overdue commands than this the device is reset at once: controllers execute few Aborts at a time (NVMe 2.0
/// §5.1, ACL).
const MOST_ABORTS: usize = 4;

/// See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Down,
}

/// What the lock protects.
pub(in crate::engine) struct SupervisedDevice {
    pub(in crate::engine) driver: Box<dyn Driver>,
    state: State,
    /// Why the last attempt to bring it back failed.
    away: String,
}

/// See the top of this file.
pub(in crate::engine) struct DeviceSupervisor {
    device: Mutex<SupervisedDevice>,
    command_queues: Mutex<Vec<Arc<CommandQueue>>>,
    reports: Arc<OverdueReports>,
    /// Signalled when the device has been released.
    pub(in crate::engine) released: OwnedFd,
    /// What the disk is; its size is in `changing` too, for the workers.
    geometry: Mutex<Geometry>,
    live: Arc<LiveGeometry>,
    tell: OnceLock<Box<dyn Fn() + Send + Sync>>,
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
            tell: OnceLock::new(),
            device: Mutex::new(SupervisedDevice { driver, state: State::Up, away: String::new() }),
            released,
            command_queues: Mutex::default(),
            reports,
            recoveries: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }
    }

    /// Adds a worker.
    pub(in crate::engine) fn enlist(&self, command_queue: Arc<CommandQueue>) {
        self.command_queues.lock().unwrap_or_else(PoisonError::into_inner).push(command_queue);
    }

    pub(in crate::engine) fn on_change(&self, tell: Box<dyn Fn() + Send + Sync>) {
        if self.tell.set(tell).is_err() {
            log::warn!("a listener for changes of the disk is set already; the new one is ignored");
        }
    }

    /// The disk's geometry. Does not wait for the device, as [`Self::lock`] would.
    pub(in crate::engine) fn geometry(&self) -> Geometry {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over the driver's geometry. Only the size may have changed.
    fn follow(&self, device: &SupervisedDevice) {
        let blocks = device.driver.geometry().blocks;
        let geometry = &mut *self.geometry.lock().unwrap_or_else(PoisonError::into_inner);
        if geometry.blocks == blocks {
            return;
        }
        log::warn!("the disk has {blocks} blocks now, {} before", geometry.blocks);
        geometry.blocks = blocks;
        self.live.blocks.store(blocks, Ordering::Relaxed);
        if let Some(tell) = self.tell.get() {
            tell();
        }
    }

    /// Handles the device's asynchronous events.
    pub(in crate::engine) fn handle_events(&self) {
        let mut device = self.lock();
        if device.state != State::Up {
            return;
        }
        match device.driver.handle_events() {
            Ok(()) => self.follow(&device),
            Err(error) => {
                log::error!("{error:#}; resetting it");
                self.reset(&mut device, InflightPolicy::Resubmit);
            }
        }
    }

    /// Locks the driver. No queue changes hands while the guard lives.
    pub(in crate::engine) fn lock(&self) -> MutexGuard<'_, SupervisedDevice> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the device is down and may come back.
    pub(in crate::engine) fn is_down(&self) -> bool {
        self.lock().state == State::Down
    }

    /// Resets the device under all workers. Until it has been reset no request is answered, because the device may still
    /// write to its memory.
    pub(in crate::engine) fn reset(&self, device: &mut SupervisedDevice, policy: InflightPolicy) {
        if device.state != State::Up {
            return;
        }
        self.command_all(|_, answer| WorkerCommand::HandBack(answer));
        // The reset settles what was reported of the former queues. A report that was read already finds `recoveries` changed.
        self.reports.forget();
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        match device.driver.recover() {
            Ok(queues) => {
                self.follow(device);
                self.give(queues, policy);
            }
            Err(error) => {
                log::error!("the device did not come back: {error:#}; requests fail until it does");
                device.state = State::Down;
                self.give(Vec::new(), InflightPolicy::Fail);
            }
        }
    }

    /// Tries to bring back a device that is down; requests keep failing meanwhile. True if trying again is cheap.
    pub(in crate::engine) fn recover(&self) -> bool {
        let mut device = self.lock();
        if device.state != State::Down {
            return true;
        }
        match device.driver.recover() {
            Ok(queues) => {
                log::warn!("the device is back; requests are served again");
                device.state = State::Up;
                self.follow(&device);
                self.give(queues, InflightPolicy::Fail);
            }
            Err(error) => {
                let why = format!("{error:#}");
                let level = if device.away == why { log::Level::Debug } else { log::Level::Info };
                log::log!(level, "the device is still away: {why}");
                device.away = why;
            }
        }
        device.driver.is_released()
    }

    /// Gives the device back to the host. Every request fails until the host has done with it and it can be taken again.
    pub(in crate::engine) fn release(&self) {
        let mut device = self.lock();
        if device.driver.is_released() {
            return;
        }
        log::error!("the host wants the device back; it is released, and every request fails until it returns");
        self.command_all(|_, answer| WorkerCommand::HandBack(answer));
        self.reports.forget();
        device.driver.release();
        device.state = State::Down;
        self.give(Vec::new(), InflightPolicy::Fail);
        signal(&self.released);
    }

    /// Locks the driver to act on a report made at `recoveries`; `None` if a reset has settled that report.
    fn lock_if_still(&self, recoveries: u64) -> Option<MutexGuard<'_, SupervisedDevice>> {
        let device = self.lock();
        let settled = device.state != State::Up || self.recoveries.load(Ordering::SeqCst) != recoveries;
        (!settled).then_some(device)
    }

    /// Resets a device that does not look alive.
    pub(in crate::engine) fn check(&self, recoveries: u64) {
        let Some(mut device) = self.lock_if_still(recoveries) else { return };
        if let Err(error) = device.driver.check() {
            log::error!("{error:#}; resetting it, with commands in flight");
            self.reset(&mut device, InflightPolicy::Resubmit);
        }
    }

    /// Asks the device to end commands that have taken too long, and resets it if that is not enough.
    pub(in crate::engine) fn abort(&self, commands: &[CommandId], recoveries: u64) {
        let Some(mut device) = self.lock_if_still(recoveries) else { return };
        log::warn!("{} commands have taken too long: {commands:?}", commands.len());
        if commands.len() <= MOST_ABORTS {
            self.aborts.fetch_add(commands.len() as u64, Ordering::Relaxed);
            match device.driver.abort(commands) {
                Ok(()) => return,
                Err(error) => log::error!("{error:#}"),
            }
        }
        self.reset(&mut device, InflightPolicy::Resubmit);
    }

    /// Resets a device that has not ended commands which it was asked to abort.
    pub(in crate::engine) fn give_up_aborting(&self, recoveries: u64) {
        let Some(mut device) = self.lock_if_still(recoveries) else { return };
        log::error!("commands did not come back after Abort; resetting the device");
        self.reset(&mut device, InflightPolicy::Resubmit);
    }

    fn give(&self, queues: Vec<Box<dyn Queue>>, policy: InflightPolicy) {
        let mut queues = queues.into_iter();
        self.command_all(|_, answer| WorkerCommand::Adopt(queues.next(), policy, answer));
    }

    /// Sends a command to every worker and waits. Workers reply to these commands at once, whatever they are doing.
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
