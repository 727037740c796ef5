//! A worker: one thread that owns some vrings and one device queue and shares neither. It polls while there is work and for
//! a bounded time after (`spin.rs`). Then it arms every notification, polls once more, and sleeps in one epoll (`sleep.rs`).
//!
//! ```text
//!            work               `spin` without work              nothing came in while arming
//!  Polling -------> Polling ; Polling ------------> Arming ----------------------------------> Sleeping
//!     ^                                               |  something came in                        | kick, device or command
//!     +-----------------------------------------------+-------------------------------------------+
//!
//!  Device:  Live --DropQueue--> Resetting --AdoptQueue(queue)--> Live
//!                                         --AdoptQueue(none)---> Failed      every request is completed with an error
//!           Failed --AdoptQueue(queue)--> Live
//! ```

mod command_queue;
mod hold;
mod poll_timer;
mod reply;
mod reset;
mod sleep;
mod spin;
mod stop;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) use command_queue::{CommandQueue, WorkerCommand};
use poll_timer::PollTimer;
use reply::{PendingReply, reply};
use spin::Spin;

use super::data_path::DataPath;
use super::error::EngineError;
use super::recovery::CommandClock;
use super::setup::VringSetup;
use super::suspension::{Stopped, Suspension};
use super::vring::{State, Vring};
use crate::addr::{Gpa, Span};
use crate::driver::Queue;
use crate::memory::MemTable;
use crate::rate_limited_log::SharedLog;
use crate::sync::mpsc::Sender;
use crate::sync::spin_loop;
use crate::sys::Poller;

/// A front-end chooses the eventfds that are watched.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Poller token of the device's completion event. A ring's token is its slot.
const DEVICE: u64 = u64::MAX;
/// Poller token of the command queue.
const COMMANDS: u64 = u64::MAX - 1;

/// Passes between two reads of the clock, which cost as much as a few idle passes.
const BUSY_PASSES_PER_CLOCK_READ: u32 = 256;
const IDLE_PASSES_PER_CLOCK_READ: u32 = 8;

/// See the diagram above.
enum Device {
    Live(Box<dyn Queue>),
    Resetting,
    Failed,
}

impl Device {
    /// The worker starts polling, so it wants no interrupt yet.
    fn live(queue: Box<dyn Queue>) -> Self {
        queue.set_interrupt_wanted(false);
        Self::Live(queue)
    }
}

/// The state of one worker thread. On cache lines of its own, wherever it is moved (two, because x86 fetches lines in pairs).
#[repr(align(128))]
pub(in crate::engine) struct Worker {
    path: DataPath,
    device: Device,
    /// True if the device may have signalled its event since the last drain.
    event_stale: bool,
    command_queue: Arc<CommandQueue>,
    poller: Poller,
    pending: Vec<PendingReply>,
    /// True from `Pause` to `Resume`: nothing is submitted.
    paused: bool,
    spin: Spin,
    clock: CommandClock,
    poll_timer: PollTimer,
    quit: bool,
}

impl Worker {
    pub(in crate::engine) fn new(
        path: DataPath,
        queue: Box<dyn Queue>,
        command_queue: Arc<CommandQueue>,
        (spin, clock): (Duration, CommandClock),
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(command_queue.event(), COMMANDS)?;
        poller.add(queue.event(), DEVICE)?;
        let device = Device::live(queue);
        let (pending, event_stale, paused, quit) = (Vec::new(), false, false, false);
        let (spin, poll_timer) = (Spin::new(spin), PollTimer::default());
        Ok(Self { path, device, event_stale, command_queue, poller, pending, paused, spin, clock, poll_timer, quit })
    }

    /// The thread's body. Returns this worker to whoever waits for the thread: its buffers are unmapped there, which the worker's
    /// own thread may not do.
    pub(in crate::engine) fn run(mut self) -> Self {
        let mut idle_since = None;
        let mut passes = 0_u32;
        while !self.quit {
            if self.command_queue.has_commands() {
                self.command_queue.take().into_iter().for_each(|command| self.handle(command));
                idle_since = None;
                continue;
            }
            passes = passes.wrapping_add(1);
            if self.pass() {
                idle_since = None;
                if passes.is_multiple_of(BUSY_PASSES_PER_CLOCK_READ) {
                    self.check_clock(Instant::now());
                }
                continue;
            }
            if idle_since.is_some() && !passes.is_multiple_of(IDLE_PASSES_PER_CLOCK_READ) {
                spin_loop();
                continue;
            }
            let now = Instant::now();
            self.check_clock(now);
            let since = *idle_since.get_or_insert_with(|| self.begin_wait(now));
            if now.duration_since(since) < self.spin.window() || self.must_poll() {
                spin_loop();
            } else {
                self.sleep(since);
                idle_since = None;
            }
        }
        self
    }

    /// One pass: new requests, doorbell, completions, used rings. A request gets its used entry in the pass that reaps its last
    /// completion. Returns true if there was anything to do.
    #[inline]
    fn pass(&mut self) -> bool {
        let path = &mut self.path;
        let mut busy = false;
        path.clock.tick();
        match &mut self.device {
            Device::Live(queue) => {
                let queue = &mut **queue;
                if !self.paused && path.submit(queue) {
                    // Submission entries and data must be in memory before the doorbell.
                    queue.ring();
                    path.counters.doorbells.add(1);
                    path.clock.tick();
                    busy = true;
                }
                if path.reap(queue) {
                    self.event_stale = true;
                    busy = true;
                }
            }
            Device::Resetting => {}
            Device::Failed => busy = path.fail_all(),
        }
        busy |= path.publish();
        if busy && !self.pending.is_empty() {
            self.poll_pending();
        }
        busy
    }

    /// Checks for commands that are overdue.
    #[inline]
    fn check_clock(&mut self, now: Instant) {
        if let Device::Live(queue) = &mut self.device {
            self.clock.check(&mut **queue, now);
        }
    }

    fn handle(&mut self, command: WorkerCommand) {
        match command {
            WorkerCommand::Start(slot, setup, answer) => reply(&answer, self.start(slot, *setup)),
            WorkerCommand::Stop(slot, answer) => self.stop(slot, answer),
            WorkerCommand::Suspend(slot, answer) => self.suspend(slot, answer),
            WorkerCommand::Enable(slot, enabled, answer) => {
                self.path.slots[slot].enabled = enabled;
                reply(&answer, ());
            }
            WorkerCommand::Call(slot, fd, answer) => {
                self.with_ring(slot, |ring, _| ring.set_call(fd));
                reply(&answer, ());
            }
            WorkerCommand::Err(slot, fd, answer) => {
                self.with_ring(slot, |ring, _| ring.set_err(fd));
                reply(&answer, ());
            }
            WorkerCommand::Kick(slot, fd, answer) => {
                self.with_ring(slot, |ring, poller| {
                    if let Err(error) = ring.set_kick(fd, poller, slot as u64) {
                        LOG.error(|| format!("watch a kick eventfd: {error}; the ring is polled"));
                    }
                });
                reply(&answer, ());
            }
            WorkerCommand::UsedLog(slot, used_log, answer) => {
                self.path.set_used_log(slot, used_log);
                reply(&answer, ());
            }
            WorkerCommand::Log(logging, answer) => {
                self.path.set_logging(logging);
                reply(&answer, ());
            }
            WorkerCommand::Publish(table, answer) => {
                self.path.guest.publish(table);
                reply(&answer, ());
            }
            WorkerCommand::RemoveMemory(table, removed, answer) => self.remove_memory(table, removed, answer),
            other => self.handle_device(other),
        }
    }

    /// Handles what does not concern a ring or guest memory.
    fn handle_device(&mut self, command: WorkerCommand) {
        match command {
            WorkerCommand::Flush(answer) => {
                self.path.request_flush();
                self.pending.push(PendingReply::Flush(answer));
            }
            WorkerCommand::Pause(answer) => self.pause(answer),
            WorkerCommand::Resume => self.paused = false,
            WorkerCommand::Hold(answer) => self.hold(answer),
            WorkerCommand::Release => self.release(),
            WorkerCommand::Measure(on) => self.path.clock.measure(on),
            WorkerCommand::DropQueue(answer) => {
                let queue = self.give_queue();
                reply(&answer, queue);
            }
            WorkerCommand::AdoptQueue(queue, policy, answer) => {
                self.adopt_queue(queue, policy);
                reply(&answer, ());
            }
            WorkerCommand::Quit => self.quit = true,
            _ => unreachable!("handled by the caller"),
        }
    }

    fn with_ring(&mut self, slot: usize, change: impl FnOnce(&mut Vring, &Poller)) {
        if let Some(ring) = &mut self.path.slots[slot].ring {
            change(ring, &self.poller);
        }
    }

    fn start(&mut self, slot: usize, mut setup: VringSetup) -> Result<(), EngineError> {
        if self.path.slots[slot].ring.is_some() {
            return Err(EngineError::RingRunning(setup.index));
        }
        let (size, region) = (setup.size, setup.inflight.take());
        let ring = Vring::start(setup, self.path.guest.table(), &self.poller, slot as u64)?;
        self.path.inflight.reserve(size);
        self.path.slots[slot].ring = Some(ring);
        if let Some(region) = region {
            self.path.track(slot, &region);
        }
        self.path.follow_log(slot);
        Ok(())
    }

    fn remove_memory(&mut self, table: Arc<MemTable>, removed: Arc<[Span<Gpa>]>, answer: Sender<()>) {
        for slot in 0..self.path.slots.len() {
            let Some(ring) = &self.path.slots[slot].ring else { continue };
            let lost = |area: &Span<Gpa>| removed.iter().any(|span| span.overlaps(area));
            if ring.state == State::Serving && ring.areas.iter().any(lost) {
                self.path.fail_ring(slot, &"its memory has been removed");
            }
        }
        self.path.guest.replace_table(table);
        self.pending.push(PendingReply::RemoveMemory(removed, answer));
        self.poll_pending();
    }

    /// Publishes used entries, then sends the replies that are due.
    fn poll_pending(&mut self) {
        self.path.publish();
        for reply_to in std::mem::take(&mut self.pending) {
            match reply_to {
                PendingReply::Stop(slot, answer) => match self.end_drained(slot) {
                    Some(Stopped { base, .. }) => reply(&answer, Some(base)),
                    None => self.pending.push(PendingReply::Stop(slot, answer)),
                },
                PendingReply::Suspend(slot, answer) => match self.end_drained(slot) {
                    Some(stopped) => reply(&answer, Suspension::Stopped(stopped)),
                    None => self.pending.push(PendingReply::Suspend(slot, answer)),
                },
                PendingReply::Flush(answer) => match self.path.flushed() {
                    Some(done) => reply(&answer, done),
                    None => self.pending.push(PendingReply::Flush(answer)),
                },
                PendingReply::Pause(answer) if self.device_is_idle() => reply(&answer, ()),
                PendingReply::Hold(answer) if self.is_drained() => reply(&answer, ()),
                waiting @ (PendingReply::Pause(_) | PendingReply::Hold(_)) => self.pending.push(waiting),
                PendingReply::RemoveMemory(removed, answer) => {
                    if self.path.inflight.uses(&self.path.guest, &removed) {
                        self.pending.push(PendingReply::RemoveMemory(removed, answer));
                    } else {
                        self.path.guest.drop_previous_table();
                        reply(&answer, ());
                    }
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.command_queue.close();
    }
}
