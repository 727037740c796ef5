//! Command time-outs. Workers count time in ticks and report overdue commands. The watchdog acts on the reports. It has its
//! own thread because the control thread may be waiting for those commands.
//!
//! ```text
//!  submitted --tick, tick--> stalled    status check; fatal or unreadable: reset
//!            --timeout-----> expired    Abort
//!            --timeout / 4-> stuck      reset; requests are submitted again
//!                                       if the reset fails: requests fail, and recovery is retried at intervals
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::overdue_reports::{OverdueReports, Reports};
use super::supervisor::DeviceSupervisor;
use crate::driver::{OverdueCommands, Queue};
use crate::eventfd::drain;
use crate::sandbox::{Entry, Role};
use crate::sync::thread::{self, JoinHandle};
use crate::sys::Poller;

/// Longest tick.
const LONGEST_TICK: Duration = Duration::from_millis(500);
/// Ticks in the shortest timeout.
const FEWEST_TICKS: u32 = 8;
/// Recovery of a failed device is retried at intervals that double this many times; of a released one at equal intervals.
const DOUBLINGS: u32 = 4;

/// How often a device without an interrupt is asked for asynchronous events.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// Poller tokens.
const REPORTS: u64 = 0;
const REMOVAL: u64 = 1;
const DEVICE_EVENT: u64 = 2;

/// Command time-out and retry interval.
#[derive(Clone, Copy, Debug)]
pub struct WatchdogOptions {
    /// Time until a command is aborted.
    pub timeout: Duration,
    /// First interval between two attempts to recover a device; the longest is 16 times as long.
    pub retry: Duration,
}

impl Default for WatchdogOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), retry: Duration::from_secs(2) }
    }
}

/// A worker's time base for command time-outs.
pub(in crate::engine) struct CommandClock {
    reports: Arc<OverdueReports>,
    tick: Duration,
    /// Ticks in the timeout.
    limit: u32,
    next: Instant,
}

impl CommandClock {
    /// The clock of one worker, which reports to `reports`.
    pub(in crate::engine) fn new(reports: &Arc<OverdueReports>, watch: WatchdogOptions) -> Self {
        let tick = (watch.timeout / FEWEST_TICKS).clamp(Duration::from_millis(1), LONGEST_TICK);
        let limit = u32::try_from(watch.timeout.as_nanos().div_ceil(tick.as_nanos())).unwrap_or(u32::MAX);
        Self { reports: Arc::clone(reports), tick, limit, next: Instant::now() }
    }

    /// Longest time between two checks of commands in flight.
    pub(in crate::engine) fn tick(&self) -> Duration {
        self.tick
    }

    /// Checks the commands in flight if a tick has passed.
    pub(in crate::engine) fn check(&mut self, queue: &mut dyn Queue, now: Instant) {
        if now < self.next || queue.in_flight() == 0 {
            return;
        }
        self.next = now + self.tick;
        let overdue = queue.tick(self.limit);
        if overdue != OverdueCommands::default() {
            self.reports.report(|reports| reports.overdue.merge(overdue));
        }
    }
}

/// The control thread's handle on the watchdog.
pub(in crate::engine) struct Watchdog {
    reports: Arc<OverdueReports>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the watchdog over `supervisor`'s device.
    pub(in crate::engine) fn start(
        supervisor: Arc<DeviceSupervisor>,
        reports: Arc<OverdueReports>,
        watch: WatchdogOptions,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&reports.event, REPORTS)?;
        let removal = supervisor.lock().driver.removal_request().map(|event| event.try_clone_to_owned()).transpose()?;
        if let Some(event) = &removal {
            poller.add(event.as_fd(), REMOVAL)?;
        }
        let device_event = supervisor.lock().driver.event_fd().map(|event| event.try_clone_to_owned()).transpose()?;
        if let Some(event) = &device_event {
            poller.add(event.as_fd(), DEVICE_EVENT)?;
        }
        let mut watchdog = WatchdogThread {
            supervisor,
            reports: Arc::clone(&reports),
            poller,
            removal,
            device_event,
            retry: watch.retry,
            watch,
        };
        let entry = Entry::new(Role::Guard);
        let thread = thread::Builder::new().name("vdv-watchdog".to_owned()).spawn(move || {
            entry.enter();
            while watchdog.handle_one_event() {}
        })?;
        Ok(Self { reports, thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.reports.report(|reports| reports.quit = true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("bug: the watchdog thread panicked");
        }
    }
}

/// The state of the watchdog's thread.
struct WatchdogThread {
    supervisor: Arc<DeviceSupervisor>,
    reports: Arc<OverdueReports>,
    poller: Poller,
    /// Readable when the host requests the device.
    removal: Option<OwnedFd>,
    /// Readable when the device may have an asynchronous event.
    device_event: Option<OwnedFd>,
    watch: WatchdogOptions,
    /// Time until the next attempt to recover a device that is down.
    retry: Duration,
}

impl WatchdogThread {
    /// Waits for one event and handles it. Returns false to quit.
    fn handle_one_event(&mut self) -> bool {
        let down = self.supervisor.is_down();
        if !down {
            self.retry = self.watch.retry;
        }
        let (mut removal_requested, mut event_pending) = (false, false);
        let polled = !down && self.supervisor.is_polled();
        let timeout = if polled { Some(EVENT_INTERVAL) } else { down.then_some(self.retry) };
        let waited = self.poller.wait(timeout, |event| {
            removal_requested |= event.token == REMOVAL;
            event_pending |= event.token == DEVICE_EVENT;
        });
        if let Err(error) = &waited {
            log::error!("the watchdog cannot wait for events: {error}");
            thread::sleep(LONGEST_TICK);
        }
        let recoveries = self.supervisor.recoveries.load(Ordering::SeqCst);
        let Reports { overdue, quit } = self.reports.take();
        if quit {
            return false;
        }
        if polled && waited.as_ref().is_ok_and(|count| *count == 0) {
            self.supervisor.handle_events();
        }
        if event_pending && let Some(event) = &self.device_event {
            drain(event);
            self.supervisor.handle_events();
        }
        if removal_requested && let Some(event) = &self.removal {
            drain(event);
            self.supervisor.release();
        } else if down {
            if waited.is_ok_and(|count| count == 0) && !self.supervisor.recover() {
                self.retry = (self.retry * 2).min(self.watch.retry * (1 << DOUBLINGS));
            }
        } else if overdue.stuck {
            self.supervisor.reset_after_abort(recoveries);
        } else if !overdue.expired.is_empty() {
            self.supervisor.abort(&overdue.expired, recoveries);
        } else if overdue.stalled {
            self.supervisor.check(recoveries);
        }
        true
    }
}
