//! The device as all workers share it: the driver behind its lock, and the ways of taking the queues from the workers and
//! giving them back. Whoever does so holds the lock, so the control thread and the guard never do it at the same time; and
//! workers never wait for either.
//!
//! ```text
//!            reset (HandBack, driver, Adopt)            revive (driver, Adopt)
//!   Up -----------------------------------------> Up ; Down ---------------------> Up
//!      -- the device does not come back --> Down
//!      -- the host wants it back ---------> Down, released: revive takes it again when the host has done with it
//! ```

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::guard::Alarm;
use super::mailbox::{Mailbox, Order};
use super::ring::signal;
use super::{Changing, EngineError};
use crate::driver::{CommandId, Driver, Geometry, Queue};

/// More overdue commands than these are not worth an Abort each: the device is reset at once. Controllers execute few
/// Aborts at a time (NVMe 2.0 §5.1, ACL).
const MOST_ABORTS: usize = 4;

/// What becomes of the requests in flight when the device has been reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Orphans {
    /// They are submitted once more, unless they have been already, or somebody waits for their end.
    Resubmit,
    /// They are answered with an error.
    Fail,
}

/// See the drawing above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Down,
}

/// What the lock protects.
pub(super) struct Kept {
    pub(super) driver: Box<dyn Driver>,
    state: State,
    /// Why it was away when it was last tried.
    away: String,
}

/// See the top of this file.
pub(super) struct Keeper {
    kept: Mutex<Kept>,
    mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    alarm: Arc<Alarm>,
    /// Signalled when the device has been released.
    pub(super) released: OwnedFd,
    /// What the disk is; its size is in `changing` too, for the workers.
    geometry: Mutex<Geometry>,
    changing: Arc<Changing>,
    tell: OnceLock<Box<dyn Fn() + Send + Sync>>,
    pub(super) recoveries: AtomicU64,
    pub(super) aborts: AtomicU64,
}

impl Keeper {
    pub(super) fn new(driver: Box<dyn Driver>, changing: Arc<Changing>, alarm: Arc<Alarm>, released: OwnedFd) -> Self {
        Self {
            geometry: Mutex::new(driver.geometry().clone()),
            changing,
            tell: OnceLock::new(),
            kept: Mutex::new(Kept { driver, state: State::Up, away: String::new() }),
            released,
            mailboxes: Mutex::default(),
            alarm,
            recoveries: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
        }
    }

    /// Makes a worker known.
    pub(super) fn enlist(&self, mailbox: Arc<Mailbox>) {
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).push(mailbox);
    }

    pub(super) fn on_change(&self, tell: Box<dyn Fn() + Send + Sync>) {
        if self.tell.set(tell).is_err() {
            log::warn!("somebody is told already when the disk changes");
        }
    }

    /// What the disk is; not waiting for the device, as [`Self::lock`] would.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the driver's geometry, of which only the size may have changed.
    fn follow(&self, kept: &Kept) {
        let blocks = kept.driver.geometry().blocks;
        let geometry = &mut *self.geometry.lock().unwrap_or_else(PoisonError::into_inner);
        if geometry.blocks == blocks {
            return;
        }
        log::warn!("the disk has {blocks} blocks now, {} before", geometry.blocks);
        geometry.blocks = blocks;
        self.changing.blocks.store(blocks, Ordering::Relaxed);
        if let Some(tell) = self.tell.get() {
            tell();
        }
    }

    /// Lets the device tell what it has to tell.
    pub(super) fn attend(&self) {
        let mut kept = self.lock();
        if kept.state != State::Up {
            return;
        }
        match kept.driver.attend() {
            Ok(()) => self.follow(&kept),
            Err(error) => {
                log::error!("{error:#}; resetting it");
                self.reset(&mut kept, Orphans::Resubmit);
            }
        }
    }

    /// Nobody takes or gives queues while the result lives.
    pub(super) fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the device is away and may come back.
    pub(super) fn is_down(&self) -> bool {
        self.lock().state == State::Down
    }

    /// Resets the device under all workers. Until it has been reset no request is answered, because the device may still
    /// write to its memory.
    pub(super) fn reset(&self, kept: &mut Kept, orphans: Orphans) {
        if kept.state != State::Up {
            return;
        }
        self.order_all(|_, answer| Order::HandBack(answer));
        // What was reported of the former queues is settled by this; whoever has read it already finds the count changed.
        self.alarm.forget();
        self.recoveries.fetch_add(1, Ordering::SeqCst);
        match kept.driver.recover() {
            Ok(queues) => {
                self.follow(kept);
                self.give(queues, orphans);
            }
            Err(error) => {
                log::error!("the device did not come back: {error:#}; requests fail until it does");
                kept.state = State::Down;
                self.give(Vec::new(), Orphans::Fail);
            }
        }
    }

    /// Tries to bring a device back that is down. Requests go on failing meanwhile. True if trying costs nothing.
    pub(super) fn revive(&self) -> bool {
        let mut kept = self.lock();
        if kept.state != State::Down {
            return true;
        }
        match kept.driver.recover() {
            Ok(queues) => {
                log::warn!("the device is back; requests are served again");
                kept.state = State::Up;
                self.follow(&kept);
                self.give(queues, Orphans::Fail);
            }
            Err(error) => {
                let why = format!("{error:#}");
                let level = if kept.away == why { log::Level::Debug } else { log::Level::Info };
                log::log!(level, "the device is still away: {why}");
                kept.away = why;
            }
        }
        kept.driver.is_released()
    }

    /// Gives the device back to the host. Every request fails until the host has done with it and it can be taken again.
    pub(super) fn release(&self) {
        let mut kept = self.lock();
        if kept.driver.is_released() {
            return;
        }
        log::error!("the host wants the device back; it is released, and every request fails until it returns");
        self.order_all(|_, answer| Order::HandBack(answer));
        self.alarm.forget();
        kept.driver.release();
        kept.state = State::Down;
        self.give(Vec::new(), Orphans::Fail);
        signal(&self.released);
    }

    /// The lock, for acting on what was reported when there had been `recoveries`; `None` if that is settled.
    fn lock_if_still(&self, recoveries: u64) -> Option<MutexGuard<'_, Kept>> {
        let kept = self.lock();
        let settled = kept.state != State::Up || self.recoveries.load(Ordering::SeqCst) != recoveries;
        (!settled).then_some(kept)
    }

    /// Resets a device that does not look alive.
    pub(super) fn check(&self, recoveries: u64) {
        let Some(mut kept) = self.lock_if_still(recoveries) else { return };
        if let Err(error) = kept.driver.check() {
            log::error!("{error:#}; resetting it, with commands in flight");
            self.reset(&mut kept, Orphans::Resubmit);
        }
    }

    /// Asks the device to end commands that have taken too long, and resets it if that is not enough.
    pub(super) fn abort(&self, commands: &[CommandId], recoveries: u64) {
        let Some(mut kept) = self.lock_if_still(recoveries) else { return };
        log::warn!("{} commands have taken too long: {commands:?}", commands.len());
        if commands.len() <= MOST_ABORTS {
            self.aborts.fetch_add(commands.len() as u64, Ordering::Relaxed);
            match kept.driver.abort(commands) {
                Ok(()) => return,
                Err(error) => log::error!("{error:#}"),
            }
        }
        self.reset(&mut kept, Orphans::Resubmit);
    }

    /// Resets a device that has not ended commands which it was asked to abort.
    pub(super) fn give_up_aborting(&self, recoveries: u64) {
        let Some(mut kept) = self.lock_if_still(recoveries) else { return };
        log::error!("commands did not come back after Abort; resetting the device");
        self.reset(&mut kept, Orphans::Resubmit);
    }

    fn give(&self, queues: Vec<Box<dyn Queue>>, orphans: Orphans) {
        let mut queues = queues.into_iter();
        self.order_all(|_, answer| Order::Adopt(queues.next(), orphans, answer));
    }

    /// Workers answer these orders at once, whatever they are doing.
    fn order_all(&self, mut order: impl FnMut(usize, Sender<()>) -> Order) {
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let posts = mailboxes.iter().enumerate();
        let answers: Vec<_> = posts.map(|(n, mailbox)| mailbox.post(|answer| order(n, answer))).collect();
        for (worker, answer) in answers.iter().enumerate() {
            if answer.recv().is_err() {
                log::error!("{}", EngineError::WorkerGone(worker));
            }
        }
    }
}
