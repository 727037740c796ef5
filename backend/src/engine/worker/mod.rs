//! A worker: one thread that owns some vrings and one device queue and shares neither. It polls while there is work and for
//! a bounded time after. Then it arms every notification, polls once more, and sleeps in one epoll.
//!
//! ```text
//!            work               `spin` without work              nothing came in while arming
//!  Polling -------> Polling ; Polling ------------> Arming ----------------------------------> Sleeping
//!     ^                                               |  something came in                        | kick, device or order
//!     +-----------------------------------------------+-------------------------------------------+
//!
//!  Device:  Live --HandBack--> Away --Adopt(queue)--> Live
//!                                   --Adopt(none)---> Gone      every request is answered with an error
//!  Gone --Adopt(queue)--> Live
//! ```

mod command_queue;

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

pub(super) use command_queue::{CommandQueue, WorkerCommand};

use super::data_path::DataPath;
use super::error::EngineError;
use super::inflight_policy::InflightPolicy;
use super::recovery::CommandClock;
use super::setup::VringSetup;
use super::vring::{State, Vring};
use crate::addr::{Gpa, Span};
use crate::driver::Queue;
use crate::eventfd::drain;
use crate::memory::MemTable;
use crate::sys::Poller;

/// Poller token of the device's completion event; rings have their slot's number.
const DEVICE: u64 = u64::MAX;
/// Poller token of the command_queue.
const COMMANDS: u64 = u64::MAX - 1;

/// Longest sleep while commands are in flight: an interrupt may be lost, but its completion entry is not.
const LONGEST_NAP: Duration = Duration::from_millis(500);

/// Passes between two reads of the clock. A read costs as much as a few idle passes.
const BUSY_PASSES_PER_LOOK: u32 = 256;
const IDLE_PASSES_PER_LOOK: u32 = 8;

/// See the drawing above.
enum Device {
    Live(Box<dyn Queue>),
    Away,
    Gone,
}

impl Device {
    /// The worker starts polling, so it wants no interrupt yet.
    fn live(queue: Box<dyn Queue>) -> Self {
        queue.set_interrupt_wanted(false);
        Self::Live(queue)
    }
}

/// A command whose reply waits until something in flight has ended.
enum PendingReply {
    Stop(usize, Sender<Option<u32>>),
    Withdraw(Arc<[Span<Gpa>]>, Sender<()>),
    Flush(Sender<bool>),
    Rest(Sender<()>),
}

/// What one thread owns.
pub(in crate::engine) struct Worker {
    path: DataPath,
    device: Device,
    /// True if the device may have signalled its event since the event was last drained.
    stale: bool,
    command_queue: Arc<CommandQueue>,
    poller: Poller,
    pending: Vec<PendingReply>,
    /// Nothing is submitted.
    resting: bool,
    spin: Duration,
    clock: CommandClock,
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
        let (pending, stale, resting, quit) = (Vec::new(), false, false, false);
        Ok(Self { path, device, stale, command_queue, poller, pending, resting, spin, clock, quit })
    }

    /// The thread's body.
    pub(in crate::engine) fn run(mut self) {
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
                if passes.is_multiple_of(BUSY_PASSES_PER_LOOK) {
                    self.look(Instant::now());
                }
                continue;
            }
            if idle_since.is_some() && !passes.is_multiple_of(IDLE_PASSES_PER_LOOK) {
                std::hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            self.look(now);
            if now.duration_since(*idle_since.get_or_insert(now)) < self.spin || self.must_poll() {
                std::hint::spin_loop();
            } else {
                self.sleep();
                idle_since = None;
            }
        }
    }

    /// One pass: new requests, doorbell, completions, used rings. Nothing stands between the end of a request and its used
    /// entry. True if there was anything to do.
    #[inline]
    fn pass(&mut self) -> bool {
        let path = &mut self.path;
        let mut busy = false;
        match &mut self.device {
            Device::Live(queue) => {
                let queue = &mut **queue;
                if !self.resting && path.submit(queue) {
                    // Entries and data are in memory; the doorbell makes the device look at them.
                    queue.ring();
                    path.counters.doorbells.add(1);
                    busy = true;
                }
                if path.reap(queue) {
                    self.stale = true;
                    busy = true;
                }
            }
            Device::Away => {}
            Device::Gone => busy = path.refuse(),
        }
        busy |= path.publish();
        if busy && !self.pending.is_empty() {
            self.poll_pending();
        }
        busy
    }

    /// Checks for commands that are overdue.
    #[inline]
    fn look(&mut self, now: Instant) {
        if let Device::Live(queue) = &mut self.device {
            self.clock.look(&mut **queue, now);
        }
    }

    /// True if a ring has no kick eventfd: nothing would wake the worker for it.
    fn must_poll(&self) -> bool {
        self.path.served().any(Vring::is_polled)
    }

    /// Arms every notification, polls once more, and waits.
    fn sleep(&mut self) {
        if let Device::Live(queue) = &self.device {
            if std::mem::take(&mut self.stale) {
                drain(queue.event());
            }
            queue.set_interrupt_wanted(true);
        }
        self.path.served().for_each(|ring| ring.queue.arm());
        // This pass finds every chain that was offered before arming and so brings no kick.
        if !self.pass() {
            self.wait();
        }
        self.path.served().for_each(|ring| ring.queue.disarm());
        if let Device::Live(queue) = &self.device {
            queue.set_interrupt_wanted(false);
        }
    }

    fn wait(&mut self) {
        let Self { poller, path, device, stale, clock, .. } = self;
        let in_flight = matches!(device, Device::Live(queue) if queue.in_flight() != 0);
        let mut useless = Vec::new();
        let waited = poller.wait(in_flight.then_some(LONGEST_NAP.min(clock.tick())), |event| match event.token {
            COMMANDS => {} // emptied when the commands are taken
            DEVICE => {
                if let Device::Live(queue) = device {
                    drain(queue.event());
                    *stale = false;
                }
            }
            slot => {
                path.counters.kicks.add(1);
                let ring = usize::try_from(slot).ok().and_then(|slot| path.slots.get(slot)?.ring.as_ref());
                if ring.is_some_and(|ring| !ring.drain_kick()) {
                    useless.push(slot);
                }
            }
        });
        if let Err(error) = waited {
            log::error!("wait for notifications: {error}; polling instead");
            std::thread::sleep(Duration::from_millis(1));
        }
        for slot in useless.into_iter().filter_map(|slot| usize::try_from(slot).ok()) {
            self.path.fail_ring(slot, &"its kick descriptor cannot be read");
            if let Some(ring) = &mut self.path.slots[slot].ring {
                ring.unwatch(&self.poller);
            }
        }
    }

    fn handle(&mut self, command: WorkerCommand) {
        match command {
            WorkerCommand::Start(slot, setup, answer) => reply(&answer, self.start(slot, *setup)),
            WorkerCommand::Stop(slot, answer) => self.stop(slot, answer),
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
                        log::error!("watch a kick eventfd: {error}; the ring is polled");
                    }
                });
                reply(&answer, ());
            }
            WorkerCommand::Publish(table, answer) => {
                self.path.guest.publish(table);
                reply(&answer, ());
            }
            WorkerCommand::Withdraw(table, removed, answer) => self.withdraw(table, removed, answer),
            WorkerCommand::Flush(answer) => {
                self.path.wants_flush();
                self.pending.push(PendingReply::Flush(answer));
            }
            WorkerCommand::Rest(answer) => {
                self.resting = true;
                self.pending.push(PendingReply::Rest(answer));
                self.poll_pending();
            }
            WorkerCommand::Go => self.resting = false,
            WorkerCommand::HandBack(answer) => {
                self.hand_back();
                reply(&answer, ());
            }
            WorkerCommand::Adopt(queue, policy, answer) => {
                self.adopt(queue, policy);
                reply(&answer, ());
            }
            WorkerCommand::Quit => self.quit = true,
        }
    }

    fn with_ring(&mut self, slot: usize, change: impl FnOnce(&mut Vring, &Poller)) {
        if let Some(ring) = &mut self.path.slots[slot].ring {
            change(ring, &self.poller);
        }
    }

    fn start(&mut self, slot: usize, setup: VringSetup) -> Result<(), EngineError> {
        if self.path.slots[slot].ring.is_some() {
            return Err(EngineError::RingRunning(setup.index));
        }
        let size = setup.size;
        let ring = Vring::start(setup, self.path.guest.table(), &self.poller, slot as u64)?;
        self.path.inflight.reserve(size);
        self.path.slots[slot].ring = Some(ring);
        Ok(())
    }

    fn stop(&mut self, slot: usize, answer: Sender<Option<u32>>) {
        match &mut self.path.slots[slot].ring {
            None => reply(&answer, None),
            Some(ring) => {
                ring.state = State::Draining;
                self.pending.push(PendingReply::Stop(slot, answer));
                self.poll_pending();
            }
        }
    }

    fn withdraw(&mut self, table: Arc<MemTable>, removed: Arc<[Span<Gpa>]>, answer: Sender<()>) {
        for slot in 0..self.path.slots.len() {
            let Some(ring) = &self.path.slots[slot].ring else { continue };
            let lost = |area: &Span<Gpa>| removed.iter().any(|span| span.overlaps(area));
            if ring.state == State::Serving && ring.areas.iter().any(lost) {
                self.path.fail_ring(slot, &"the memory it lies in has been taken away");
            }
        }
        self.path.guest.withdraw(table);
        self.pending.push(PendingReply::Withdraw(removed, answer));
        self.poll_pending();
    }

    /// Answers the commands whose time has come. Used entries have been published by then.
    fn poll_pending(&mut self) {
        self.path.publish();
        for reply_to in std::mem::take(&mut self.pending) {
            match reply_to {
                PendingReply::Stop(slot, answer) => {
                    match self.path.slots[slot].ring.take_if(|ring| ring.in_flight == 0) {
                        Some(mut ring) => {
                            ring.unwatch(&self.poller);
                            ring.queue.arm(); // the next user of the ring expects kicks
                            reply(&answer, Some(ring.queue.base()));
                        }
                        None => self.pending.push(PendingReply::Stop(slot, answer)),
                    }
                }
                PendingReply::Flush(answer) => match self.path.flushed() {
                    Some(done) => reply(&answer, done),
                    None => self.pending.push(PendingReply::Flush(answer)),
                },
                PendingReply::Rest(answer) => {
                    let rests = match &self.device {
                        Device::Live(queue) => queue.in_flight() == 0,
                        Device::Away => false,
                        Device::Gone => true,
                    };
                    if rests { reply(&answer, ()) } else { self.pending.push(PendingReply::Rest(answer)) }
                }
                PendingReply::Withdraw(removed, answer) => {
                    if self.path.inflight.touch(&removed) {
                        self.pending.push(PendingReply::Withdraw(removed, answer));
                    } else {
                        self.path.guest.forget();
                        reply(&answer, ());
                    }
                }
            }
        }
    }

    fn hand_back(&mut self) {
        if let Device::Live(queue) = std::mem::replace(&mut self.device, Device::Away)
            && let Err(error) = self.poller.remove(queue.event())
        {
            log::error!("stop watching the device's event: {error}");
        }
    }

    fn adopt(&mut self, queue: Option<Box<dyn Queue>>, policy: InflightPolicy) {
        // A stop or a memory removal is waiting for these requests: fail them instead of submitting them again.
        let wanted = queue.is_some() && self.pending.is_empty();
        self.path.abandon(if wanted { policy } else { InflightPolicy::Fail });
        self.device = match queue {
            None => Device::Gone,
            Some(queue) => {
                if let Err(error) = self.poller.add(queue.event(), DEVICE) {
                    log::error!("watch the device's event: {error}");
                }
                Device::live(queue)
            }
        };
        self.poll_pending();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.command_queue.close();
    }
}

/// Replies to a command. A failed send means that the control thread has stopped waiting.
fn reply<T>(answer: &Sender<T>, value: T) {
    let _ = answer.send(value);
}
