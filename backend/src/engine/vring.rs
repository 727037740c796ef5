//! A started vring: its virtqueue, its three eventfds and its state. [`Virtqueue`] is the memory layout alone.
//!
//! ```text
//!            start                     stop                 last request answered
//!   (none) ---------> Serving ------------------> Draining ----------------------> (none)
//!                        |                           ^
//!                        | rule of the ring broken   | stop
//!                        +---------> Broken ---------+
//! ```
//! Only a Serving ring that is also enabled (SET_VRING_ENABLE) takes new requests; every state answers those it has taken.

use std::io;
use std::os::fd::OwnedFd;

use super::error::EngineError;
use super::setup::VringSetup;
use super::statistics::Counters;
use super::virtqueue::Virtqueue;
use crate::eventfd::{drain, make_nonblocking, signal};
use crate::memory::MemTable;
use crate::sys::Poller;

/// See the drawing above.
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
    /// Chains taken and not yet given back.
    pub(super) in_flight: u16,
    /// Where it lies, to notice that its memory goes away.
    pub(super) areas: [crate::addr::Span<crate::addr::Gpa>; 3],
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
}

impl Vring {
    /// Resolves the ring's memory and starts to watch its kicks under `token`.
    pub(super) fn start(setup: VringSetup, table: &MemTable, poller: &Poller, token: u64) -> Result<Self, EngineError> {
        let queue = Virtqueue::new(&setup, table)?;
        queue.disarm();
        let areas = [setup.desc, setup.avail, setup.used];
        let mut ring = Self { queue, state: State::Serving, in_flight: 0, areas, kick: None, call: None, err: None };
        ring.set_call(setup.call);
        ring.set_err(setup.err);
        ring.set_kick(setup.kick, poller, token).map_err(|source| EngineError::Kick { index: setup.index, source })?;
        Ok(ring)
    }

    /// True if the ring has no kick eventfd, so that only looking finds new requests.
    pub(super) fn is_polled(&self) -> bool {
        self.kick.is_none()
    }

    /// Watches another kick eventfd, or none. On error the ring is polled.
    pub(super) fn set_kick(&mut self, kick: Option<OwnedFd>, poller: &Poller, token: u64) -> io::Result<()> {
        self.unwatch(poller);
        if let Some(kick) = kick {
            make_nonblocking(&kick);
            poller.add(&kick, token)?;
            self.kick = Some(kick);
        }
        Ok(())
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        call.as_ref().inspect(|fd| make_nonblocking(fd));
        self.call = call;
    }

    pub(super) fn set_err(&mut self, err: Option<OwnedFd>) {
        err.as_ref().inspect(|fd| make_nonblocking(fd));
        self.err = err;
    }

    /// Stops watching the kick eventfd and closes it.
    pub(super) fn unwatch(&mut self, poller: &Poller) {
        if let Some(kick) = self.kick.take()
            && let Err(error) = poller.remove(&kick)
        {
            log::error!("stop watching a kick eventfd: {error}");
        }
    }

    /// Empties the kick eventfd after a wake-up; false if it is of no further use.
    pub(super) fn drain_kick(&self) -> bool {
        self.kick.as_ref().is_none_or(drain)
    }

    /// Publishes what has been given back and notifies the driver if it wants that.
    #[inline]
    pub(super) fn publish(&mut self, counters: &Counters) {
        if self.queue.publish()
            && let Some(call) = &self.call
        {
            signal(call);
            counters.calls.add(1);
        }
    }

    /// The ring serves nothing until it is restarted (vhost-user: SET_VRING_ERR).
    pub(super) fn fail(&mut self) {
        if self.state == State::Serving {
            self.state = State::Broken;
        }
        if let Some(err) = &self.err {
            signal(err);
        }
    }
}
