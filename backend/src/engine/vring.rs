//! A started vring: its virtqueue, its three eventfds and its state. [`Virtqueue`] is the memory layout alone.
//!
//! ```text
//!            start                     stop                 last request complete
//!   (none) ---------> Serving ------------------> Draining ----------------------> (none)
//!                        |                           ^
//!                        | invalid ring contents     | stop
//!                        +---------> Broken ---------+
//! ```
//! Requests are taken only from a ring that is Serving and enabled (SET_VRING_ENABLE). Requests already taken are completed in
//! every state.

use std::io;
use std::os::fd::OwnedFd;

use super::dirty_log::DirtyLogging;
use super::error::EngineError;
use super::setup::VringSetup;
use super::statistics::Counters;
use super::virtqueue::Virtqueue;
use crate::addr::{Gpa, Span};
use crate::eventfd::{drain, make_nonblocking, signal};
use crate::memory::{LogFault, MemTable};
use crate::rate_limited_log::SharedLog;
use crate::sys::Poller;

/// A front-end chooses the eventfds that are watched.
static LOG: SharedLog = SharedLog::new(module_path!());

/// See the diagram above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Serving,
    Broken,
    Draining,
}

/// A started ring.
pub(super) struct Vring {
    pub(super) queue: Virtqueue,
    pub(super) state: State,
    /// Chains taken and not yet returned.
    pub(super) in_flight: u16,
    /// Chains left to the record of requests in flight, for whoever serves the ring next.
    pub(super) left: u16,
    /// Chains returned since they were counted last.
    pub(super) completed: u64,
    /// The ring's areas, to find rings in memory that is removed.
    pub(super) areas: [Span<Gpa>; 3],
    /// See [`VringSetup::used_log`].
    pub(super) used_log: Option<Gpa>,
    /// Its used entries cannot be marked, so they are not published.
    withheld: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

impl Vring {
    /// Finds the ring's areas in `table` and polls its kick eventfd with `token`.
    pub(super) fn start(setup: VringSetup, table: &MemTable, poller: &Poller, token: u64) -> Result<Self, EngineError> {
        let queue = Virtqueue::new(&setup, table)?;
        queue.disarm();
        let areas = [setup.desc, setup.avail, setup.used];
        let mut ring = Self {
            queue,
            state: State::Serving,
            in_flight: 0,
            left: 0,
            completed: 0,
            areas,
            used_log: setup.used_log,
            withheld: false,
            kick: None,
            call: None,
            err: None,
        };
        ring.set_call(setup.call);
        ring.set_err(setup.err);
        ring.set_kick(setup.kick, poller, token).map_err(|source| EngineError::Kick { index: setup.index, source })?;
        Ok(ring)
    }

    /// True if nothing is in flight, nor waits to be submitted again.
    pub(super) fn is_drained(&self) -> bool {
        self.in_flight == 0 && !self.queue.has_recovered()
    }

    /// Takes no more requests, and leaves those that wait to be submitted again to the record.
    pub(super) fn suspend(&mut self) {
        self.state = State::Draining;
        self.left += self.queue.forget_recovered();
    }

    /// True if the ring has no kick eventfd. The worker must then poll it.
    pub(super) fn is_polled(&self) -> bool {
        self.kick.is_none()
    }

    /// Replaces the kick eventfd. On error the ring is polled.
    pub(super) fn set_kick(&mut self, kick: Option<OwnedFd>, poller: &Poller, token: u64) -> io::Result<()> {
        self.unwatch(poller);
        if let Some(kick) = kick {
            make_nonblocking(&kick);
            poller.add(&kick, token)?;
            self.kick = Some(kick);
        }
        Ok(())
    }

    /// Replaces the call eventfd. QEMU sends the guest's own one only after the ring has started.
    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        call.as_ref().inspect(|fd| make_nonblocking(fd));
        self.call = call;
        self.call_if_run();
    }

    /// Notifies the driver if the ring has run: the process before this one may have died after it published used entries and
    /// before it called. Drivers accept a call without a used entry (virtio 1.2 §2.3).
    pub(super) fn call_if_run(&self) {
        if let Some(call) = self.call.as_ref().filter(|_| self.queue.has_run()) {
            signal(call);
        }
    }

    pub(super) fn set_err(&mut self, err: Option<OwnedFd>) {
        err.as_ref().inspect(|fd| make_nonblocking(fd));
        self.err = err;
    }

    /// Removes the kick eventfd from `poller` and closes it.
    pub(super) fn unwatch(&mut self, poller: &Poller) {
        if let Some(kick) = self.kick.take()
            && let Err(error) = poller.remove(&kick)
        {
            LOG.error(|| format!("stop watching a kick eventfd: {error}"));
        }
    }

    /// Drains the kick eventfd after a wake-up. Returns false if it cannot be read.
    pub(super) fn drain_kick(&self) -> bool {
        self.kick.as_ref().is_none_or(drain)
    }

    /// Publishes the used entries, and notifies the driver unless it has suppressed that.
    #[inline]
    pub(super) fn publish(&mut self, counters: &Counters) {
        if self.queue.publish()
            && let Some(call) = &self.call
        {
            signal(call);
            counters.calls.add(1);
        }
    }

    /// True if there are used entries that may be published.
    #[inline]
    pub(super) fn can_publish(&self) -> bool {
        self.queue.has_unpublished() && !self.withheld
    }

    /// The same as [`Self::publish`] while dirty pages are logged: the driver sees no used entry whose pages are not marked.
    ///
    /// # Errors
    /// Marks may be missing. Nothing has been published, nor will be.
    #[cold]
    pub(super) fn publish_logged(&mut self, counters: &Counters, logging: &DirtyLogging) -> Result<(), LogFault> {
        let entries = self.queue.unpublished();
        self.queue.mark_used(entries);
        self.withheld = logging.fault().is_err();
        logging.fault()?;
        self.publish(counters);
        self.queue.mark_used(entries);
        logging.signal();
        Ok(())
    }

    /// The log has changed. All that the worker may have written to the ring is marked.
    pub(super) fn follow_log(&mut self, logging: Option<&DirtyLogging>) {
        let [desc, ..] = self.areas;
        self.queue.set_log(logging.zip(self.used_log).map(|(logging, used)| logging.of_ring(used, desc.start())));
    }

    /// Stops taking requests until the ring is restarted, and signals the err eventfd (vhost-user: SET_VRING_ERR).
    pub(super) fn fail(&mut self) {
        if self.state == State::Serving {
            self.state = State::Broken;
        }
        self.queue.forget_recovered();
        if let Some(err) = &self.err {
            signal(err);
        }
    }
}
