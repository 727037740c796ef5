//! A worker: one thread that owns some rings and one device queue, and shares neither. It polls while there is work and
//! for a bounded time after, then arms every notification, looks a last time, and sleeps in one epoll.
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

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::guard::Sentry;
use super::keeper::Orphans;
use super::mailbox::{Mailbox, Order};
use super::pass::Path;
use super::ring::{Ring, State, drain};
use super::{EngineError, RingSetup};
use crate::addr::{Gpa, Span};
use crate::driver::Queue;
use crate::memory::MemTable;
use crate::sys::Poller;

/// Poller token of the device's completion event; rings have their seat's number.
const DEVICE: u64 = u64::MAX;
/// Poller token of the mailbox.
const ORDERS: u64 = u64::MAX - 1;

/// How long a worker sleeps at most while commands are in flight: an interrupt may get lost, its completion does not.
const LONGEST_NAP: Duration = Duration::from_millis(500);

/// Passes between two looks at the clock, which costs as much as some passes that find nothing.
const BUSY_PASSES_PER_LOOK: u32 = 256;
const IDLE_PASSES_PER_LOOK: u32 = 8;

/// See the drawing above.
enum Device {
    Live(Box<dyn Queue>),
    Away,
    Gone,
}

impl Device {
    /// The worker begins by looking.
    fn live(queue: Box<dyn Queue>) -> Self {
        queue.set_awaited(false);
        Self::Live(queue)
    }
}

/// An order that is answered when something in flight has ended.
enum Promise {
    Stop(usize, Sender<Option<u32>>),
    Withdraw(Arc<[Span<Gpa>]>, Sender<()>),
    Flush(Sender<bool>),
    Rest(Sender<()>),
}

/// What one thread owns.
pub(super) struct Worker {
    path: Path,
    device: Device,
    /// True if the device may have signalled its event since it was last emptied.
    stale: bool,
    mailbox: Arc<Mailbox>,
    poller: Poller,
    promises: Vec<Promise>,
    /// Nothing is submitted.
    resting: bool,
    spin: Duration,
    sentry: Sentry,
    quit: bool,
}

impl Worker {
    pub(super) fn new(
        path: Path,
        queue: Box<dyn Queue>,
        mailbox: Arc<Mailbox>,
        (spin, sentry): (Duration, Sentry),
    ) -> std::io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(mailbox.event(), ORDERS)?;
        poller.add(queue.event(), DEVICE)?;
        let device = Device::live(queue);
        let (promises, stale, resting, quit) = (Vec::new(), false, false, false);
        Ok(Self { path, device, stale, mailbox, poller, promises, resting, spin, sentry, quit })
    }

    /// The thread's body.
    pub(super) fn run(mut self) {
        let mut idle_since = None;
        let mut passes = 0_u32;
        while !self.quit {
            if self.mailbox.has_orders() {
                self.mailbox.take().into_iter().for_each(|order| self.obey(order));
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

    /// Once round: new requests, doorbell, completions, used rings; so nothing is between the end of a request and the used ring.
    /// True if there was anything to do.
    #[inline]
    fn pass(&mut self) -> bool {
        let path = &mut self.path;
        let mut busy = false;
        match &mut self.device {
            Device::Live(queue) => {
                let queue = &mut **queue;
                if !self.resting && path.submit(queue) {
                    // Entries and data lie in memory, the device does not know yet: what it must see is made visible here.
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
        if busy && !self.promises.is_empty() {
            self.keep_promises();
        }
        busy
    }

    /// Sees after commands that are late.
    #[inline]
    fn look(&mut self, now: Instant) {
        if let Device::Live(queue) = &mut self.device {
            self.sentry.look(&mut **queue, now);
        }
    }

    /// True if a ring has no kick eventfd: then nothing would end a sleep.
    fn must_poll(&self) -> bool {
        self.path.served().any(Ring::is_polled)
    }

    /// Arms every notification, looks a last time, and waits for one of them.
    fn sleep(&mut self) {
        if let Device::Live(queue) = &self.device {
            if std::mem::take(&mut self.stale) {
                drain(queue.event());
            }
            queue.set_awaited(true);
        }
        self.path.served().for_each(|ring| ring.queue.arm());
        // This last pass sees every chain for which there will be no kick.
        if !self.pass() {
            self.wait();
        }
        self.path.served().for_each(|ring| ring.queue.disarm());
        if let Device::Live(queue) = &self.device {
            queue.set_awaited(false);
        }
    }

    fn wait(&mut self) {
        let Self { poller, path, device, stale, sentry, .. } = self;
        let in_flight = matches!(device, Device::Live(queue) if queue.in_flight() != 0);
        let mut useless = Vec::new();
        let waited = poller.wait(in_flight.then_some(LONGEST_NAP.min(sentry.beat())), |event| match event.token {
            ORDERS => {} // emptied when the orders are taken
            DEVICE => {
                if let Device::Live(queue) = device {
                    drain(queue.event());
                    *stale = false;
                }
            }
            seat => {
                path.counters.kicks.add(1);
                let ring = usize::try_from(seat).ok().and_then(|seat| path.seats.get(seat)?.ring.as_ref());
                if ring.is_some_and(|ring| !ring.drain_kick()) {
                    useless.push(seat);
                }
            }
        });
        if let Err(error) = waited {
            log::error!("wait for notifications: {error}; polling instead");
            std::thread::sleep(Duration::from_millis(1));
        }
        for seat in useless.into_iter().filter_map(|seat| usize::try_from(seat).ok()) {
            self.path.fail_ring(seat, &"its kick descriptor cannot be read");
            if let Some(ring) = &mut self.path.seats[seat].ring {
                ring.unwatch(&self.poller);
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(seat, setup, answer) => tell(&answer, self.start(seat, *setup)),
            Order::Stop(seat, answer) => self.stop(seat, answer),
            Order::Enable(seat, enabled, answer) => {
                self.path.seats[seat].enabled = enabled;
                tell(&answer, ());
            }
            Order::Call(seat, fd, answer) => {
                self.with_ring(seat, |ring, _| ring.set_call(fd));
                tell(&answer, ());
            }
            Order::Err(seat, fd, answer) => {
                self.with_ring(seat, |ring, _| ring.set_err(fd));
                tell(&answer, ());
            }
            Order::Kick(seat, fd, answer) => {
                self.with_ring(seat, |ring, poller| {
                    if let Err(error) = ring.set_kick(fd, poller, seat as u64) {
                        log::error!("watch a kick eventfd: {error}; the ring is polled");
                    }
                });
                tell(&answer, ());
            }
            Order::Publish(table, answer) => {
                self.path.guest.publish(table);
                tell(&answer, ());
            }
            Order::Withdraw(table, removed, answer) => self.withdraw(table, removed, answer),
            Order::Flush(answer) => {
                self.path.wants_flush();
                self.promises.push(Promise::Flush(answer));
            }
            Order::Rest(answer) => {
                self.resting = true;
                self.promises.push(Promise::Rest(answer));
                self.keep_promises();
            }
            Order::Go => self.resting = false,
            Order::HandBack(answer) => {
                self.hand_back();
                tell(&answer, ());
            }
            Order::Adopt(queue, orphans, answer) => {
                self.adopt(queue, orphans);
                tell(&answer, ());
            }
            Order::Quit => self.quit = true,
        }
    }

    fn with_ring(&mut self, seat: usize, change: impl FnOnce(&mut Ring, &Poller)) {
        if let Some(ring) = &mut self.path.seats[seat].ring {
            change(ring, &self.poller);
        }
    }

    fn start(&mut self, seat: usize, setup: RingSetup) -> Result<(), EngineError> {
        if self.path.seats[seat].ring.is_some() {
            return Err(EngineError::RingRunning(setup.index));
        }
        let size = setup.size;
        let ring = Ring::start(setup, self.path.guest.table(), &self.poller, seat as u64)?;
        self.path.flights.reserve(size);
        self.path.seats[seat].ring = Some(ring);
        Ok(())
    }

    fn stop(&mut self, seat: usize, answer: Sender<Option<u32>>) {
        match &mut self.path.seats[seat].ring {
            None => tell(&answer, None),
            Some(ring) => {
                ring.state = State::Draining;
                self.promises.push(Promise::Stop(seat, answer));
                self.keep_promises();
            }
        }
    }

    fn withdraw(&mut self, table: Arc<MemTable>, removed: Arc<[Span<Gpa>]>, answer: Sender<()>) {
        for seat in 0..self.path.seats.len() {
            let Some(ring) = &self.path.seats[seat].ring else { continue };
            let lost = |area: &Span<Gpa>| removed.iter().any(|span| span.overlaps(area));
            if ring.state == State::Serving && ring.areas.iter().any(lost) {
                self.path.fail_ring(seat, &"the memory it lies in has been taken away");
            }
        }
        self.path.guest.withdraw(table);
        self.promises.push(Promise::Withdraw(removed, answer));
        self.keep_promises();
    }

    /// Answers the orders whose time has come. Used entries have been published by then.
    fn keep_promises(&mut self) {
        self.path.publish();
        for promise in std::mem::take(&mut self.promises) {
            match promise {
                Promise::Stop(seat, answer) => match self.path.seats[seat].ring.take_if(|ring| ring.in_flight == 0) {
                    Some(mut ring) => {
                        ring.unwatch(&self.poller);
                        ring.queue.arm(); // whoever serves it next expects kicks
                        tell(&answer, Some(ring.queue.base()));
                    }
                    None => self.promises.push(Promise::Stop(seat, answer)),
                },
                Promise::Flush(answer) => match self.path.flushed() {
                    Some(done) => tell(&answer, done),
                    None => self.promises.push(Promise::Flush(answer)),
                },
                Promise::Rest(answer) => {
                    let rests = match &self.device {
                        Device::Live(queue) => queue.in_flight() == 0,
                        Device::Away => false,
                        Device::Gone => true,
                    };
                    if rests { tell(&answer, ()) } else { self.promises.push(Promise::Rest(answer)) }
                }
                Promise::Withdraw(removed, answer) => {
                    if self.path.flights.touch(&removed) {
                        self.promises.push(Promise::Withdraw(removed, answer));
                    } else {
                        self.path.guest.forget();
                        tell(&answer, ());
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

    fn adopt(&mut self, queue: Option<Box<dyn Queue>>, orphans: Orphans) {
        // Whoever waits for requests to end has waited long enough.
        let wanted = queue.is_some() && self.promises.is_empty();
        self.path.abandon(if wanted { orphans } else { Orphans::Fail });
        self.device = match queue {
            None => Device::Gone,
            Some(queue) => {
                if let Err(error) = self.poller.add(queue.event(), DEVICE) {
                    log::error!("watch the device's event: {error}");
                }
                Device::live(queue)
            }
        };
        self.keep_promises();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

/// Answers an order. Nobody waits any more if the control thread has given up on it.
fn tell<T>(answer: &Sender<T>, value: T) {
    let _ = answer.send(value);
}
