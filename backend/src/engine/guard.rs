//! Looks after commands that do not come back. A worker counts time in beats and reports what is late; the guard, a thread
//! of its own because the control thread may be waiting for just those commands, acts on it.
//!
//! ```text
//!  submitted --beat, beat--> late       is the device there, is it alive?  no: reset
//!            --timeout-----> overdue    Abort
//!            --timeout / 4-> stuck      reset; requests are submitted once more
//!                                       the device does not come back: requests fail, it is tried again at intervals
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::keeper::Keeper;
use super::ring::{drain, signal};
use crate::driver::{Lateness, Queue};
use crate::sys::Poller;

/// The longest time between two looks at the clock of commands in flight.
const LONGEST_BEAT: Duration = Duration::from_millis(500);
/// Beats of the shortest timeout.
const FEWEST_BEATS: u32 = 8;
/// A device that does not answer is tried at intervals that double this often; one that is not there, at equal ones.
const DOUBLINGS: u32 = 4;

/// Poller tokens.
const REPORTS: u64 = 0;
const REMOVAL: u64 = 1;
const NOTICE: u64 = 2;

/// How long the device is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    /// How long a command may take before it is aborted.
    pub timeout: Duration,
    /// When a device that did not come back is tried again, at first; 16 times as long in the end.
    pub retry: Duration,
}

impl Default for Watch {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), retry: Duration::from_secs(2) }
    }
}

/// What the workers have reported and the guard has not seen yet.
#[derive(Default)]
struct Reports {
    lateness: Lateness,
    quit: bool,
}

/// The way from the workers to the guard.
pub(super) struct Alarm {
    reports: Mutex<Reports>,
    event: OwnedFd,
}

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { reports: Mutex::default(), event })
    }

    fn raise(&self, change: impl FnOnce(&mut Reports)) {
        change(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner));
        signal(&self.event);
    }

    /// Drops what has been reported of commands.
    pub(super) fn forget(&self) {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).lateness = Lateness::default();
    }

    fn take(&self) -> Reports {
        drain(&self.event);
        std::mem::take(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A worker's clock.
pub(super) struct Sentry {
    alarm: Arc<Alarm>,
    beat: Duration,
    /// Beats of the timeout.
    limit: u32,
    next: Instant,
}

impl Sentry {
    /// How long commands in flight may be left alone.
    pub(super) fn beat(&self) -> Duration {
        self.beat
    }

    /// Looks at the commands in flight if a beat has passed.
    pub(super) fn look(&mut self, queue: &mut dyn Queue, now: Instant) {
        if now < self.next || queue.in_flight() == 0 {
            return;
        }
        self.next = now + self.beat;
        let lateness = queue.beat(self.limit);
        if lateness != Lateness::default() {
            self.alarm.raise(|reports| reports.lateness.join(lateness));
        }
    }
}

/// The control thread's handle on the guard.
pub(super) struct Guard {
    alarm: Arc<Alarm>,
    watch: Watch,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// A guard over what `keeper` keeps.
    pub(super) fn start(keeper: Arc<Keeper>, alarm: Arc<Alarm>, watch: Watch) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&alarm.event, REPORTS)?;
        let removal = keeper.lock().driver.removal().map(|event| event.try_clone_to_owned()).transpose()?;
        if let Some(event) = &removal {
            poller.add(event.as_fd(), REMOVAL)?;
        }
        let notice = keeper.lock().driver.notice().map(|event| event.try_clone_to_owned()).transpose()?;
        if let Some(event) = &notice {
            poller.add(event.as_fd(), NOTICE)?;
        }
        let mut duty = Duty { keeper, alarm: Arc::clone(&alarm), poller, removal, notice, retry: watch.retry, watch };
        let thread = std::thread::Builder::new().name("vdv-guard".to_owned()).spawn(move || while duty.once() {})?;
        Ok(Self { alarm, watch, thread: Some(thread) })
    }

    /// The clock of one worker.
    pub(super) fn sentry(&self) -> Sentry {
        let beat = (self.watch.timeout / FEWEST_BEATS).clamp(Duration::from_millis(1), LONGEST_BEAT);
        let limit = u32::try_from(self.watch.timeout.as_nanos().div_ceil(beat.as_nanos())).unwrap_or(u32::MAX);
        Sentry { alarm: Arc::clone(&self.alarm), beat, limit, next: Instant::now() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.alarm.raise(|reports| reports.quit = true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the guard ended by a bug");
        }
    }
}

/// What the guard's thread owns.
struct Duty {
    keeper: Arc<Keeper>,
    alarm: Arc<Alarm>,
    poller: Poller,
    /// Signalled when the host wants the device back.
    removal: Option<OwnedFd>,
    /// Signalled when the device may have something to tell.
    notice: Option<OwnedFd>,
    watch: Watch,
    /// How long until a device that is away is tried.
    retry: Duration,
}

impl Duty {
    /// Waits for something to do, and does it; false at the end.
    fn once(&mut self) -> bool {
        let down = self.keeper.is_down();
        if !down {
            self.retry = self.watch.retry;
        }
        let (mut asked, mut told) = (false, false);
        let waited = self.poller.wait(down.then_some(self.retry), |event| {
            asked |= event.token == REMOVAL;
            told |= event.token == NOTICE;
        });
        if let Err(error) = &waited {
            log::error!("the guard waits: {error}");
            std::thread::sleep(LONGEST_BEAT);
        }
        let recoveries = self.keeper.recoveries.load(Ordering::SeqCst);
        let Reports { lateness, quit } = self.alarm.take();
        if quit {
            return false;
        }
        if told && let Some(event) = &self.notice {
            drain(event);
            self.keeper.attend();
        }
        if asked && let Some(event) = &self.removal {
            drain(event);
            self.keeper.release();
        } else if down {
            if waited.is_ok_and(|count| count == 0) && !self.keeper.revive() {
                self.retry = (self.retry * 2).min(self.watch.retry * (1 << DOUBLINGS));
            }
        } else if lateness.stuck {
            self.keeper.give_up_aborting(recoveries);
        } else if !lateness.overdue.is_empty() {
            self.keeper.abort(&lateness.overdue, recoveries);
        } else if lateness.late {
            self.keeper.check(recoveries);
        }
        true
    }
}
