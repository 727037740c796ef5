//! The control loop as the owner of a session that is handed over, and as its next owner.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::server::{ControlLoop, FRONT_END};
use super::{Error, connection::Connection};
use crate::driver::DiskState;
use crate::engine::Held;
use crate::handover::{
    Applicants, Description, DeviceState, FrontEnd, FunctionState, Incoming, ListenerState, Outcome, Outgoing, Owner,
    hand_over,
};
use crate::service_manager::FdStore;
use crate::socket::Socket;

/// How long requests in flight may take to complete. A drive that is slower is not handed over.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The function, as it changes hands.
pub trait MovableFunction: Send {
    /// Whether it can move, before anything has been stopped for it.
    ///
    /// # Errors
    /// Why it cannot.
    fn check(&self) -> Result<(), String>;
    /// Adds what moves to the descriptors. The device is stopped.
    ///
    /// # Errors
    /// Why it cannot move.
    fn export(&mut self, outgoing: &mut Outgoing) -> Result<FunctionState, String>;
    /// Takes everything back from a successor that has ended. The device is stopped.
    fn take_back(&mut self);
}

/// See [`Inheritance::open_store`].
pub type OpenStoreFn = Box<dyn FnOnce() -> Option<FdStore>>;

/// See [`Inheritance::settle`].
pub type SettleFn = Box<dyn FnOnce(Result<(), &Error>)>;

/// What makes a server hand its session over.
pub struct HandOver {
    /// Who asks for it.
    pub applicants: Applicants,
    /// The function that moves.
    pub function: Box<dyn MovableFunction>,
}

/// A session to go on with.
pub struct Inheritance {
    /// The front-end's.
    pub front_end: Option<FrontEnd>,
    /// The write cache was on; `None` if that is not known.
    pub write_cache: Option<bool>,
    /// The rings ran when the process before ended: it has crashed.
    pub crashed: bool,
    /// The descriptors.
    pub descriptors: Incoming,
    /// Called once: when everything is restored and no vring runs, to take the session, or with the reason why it cannot be
    /// restored. It must end the process if the session belongs to another process.
    pub settle: SettleFn,
    /// Called once after that, to keep the session with the service manager.
    pub open_store: OpenStoreFn,
}

/// CLOCK_MONOTONIC in ns, which all processes of a host share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// The session while it changes hands.
struct Session<'a, 'd> {
    control: &'a ControlLoop<'d>,
    function: &'a mut dyn MovableFunction,
    successors: &'a Applicants,
    paused_at: u64,
    held: Option<Held>,
    lent: Option<DiskState>,
}

impl Owner for Session<'_, '_> {
    type Session = (Description, Outgoing);

    fn drain(&mut self) -> Result<(), String> {
        if self.control.next.is_some() {
            return Err("a front-end waits to take the place of the one that is served".into());
        }
        self.function.check()?;
        self.paused_at = monotonic_ns();
        let held = self.control.device.engine.hold(DRAIN_LIMIT).map_err(|error| error.to_string())?;
        self.held = Some(held);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), String> {
        if let Some(connection) = &self.control.connection {
            connection.session().pause().map_err(|error| error.to_string())?;
        }
        let disk = self.control.device.engine.lend_device().map_err(|error| format!("{error:#}"))?;
        self.lent = Some(disk);
        Ok(())
    }

    fn describe(&mut self) -> Result<Self::Session, String> {
        let mut outgoing = Outgoing::default();
        let text = |error: std::io::Error| error.to_string();
        let engine = &self.control.device.engine;
        let geometry = engine.geometry();
        let disk = self.lent.clone().ok_or("the device has not been stopped")?;
        let function = self.function.export(&mut outgoing)?;
        let (blocks, read_only, write_cache) = (geometry.blocks, geometry.read_only, engine.write_cache());
        let listener = match &self.control.endpoint.0 {
            Socket::Listening(listener) => Some(ListenerState {
                socket: outgoing.push(&listener.socket).map_err(text)?,
                name: listener.name().to_owned(),
                file: listener.file(),
            }),
            Socket::Connected(_) => None,
        };
        let front_end = self.control.connection.as_ref().map(|connection| connection.describe(&mut outgoing));
        let description = Description {
            version: Description::VERSION,
            paused_at: self.paused_at,
            device: DeviceState { disk, blocks, read_only, write_cache, function },
            listener,
            stored: self.control.store.as_ref().map(FdStore::stored).unwrap_or_default(),
            successors: self.successors.describe(&mut outgoing).map_err(text)?,
            front_end: front_end.transpose().map_err(text)?,
        };
        Ok((description, outgoing))
    }

    fn resume(&mut self) {
        if self.lent.take().is_some() {
            self.control.device.engine.take_device_back(|| self.function.take_back());
        }
        if let Some(connection) = &self.control.connection {
            connection.session().resume();
        }
        self.held = None;
    }

    fn leave(&mut self) {
        if let Some(held) = self.held.take() {
            held.leave();
        }
    }
}

impl ControlLoop<'_> {
    /// Hears successors. Returns the process that has taken the session, if one has.
    pub(super) fn hear_successors(&mut self) -> Option<u32> {
        let mut hand = self.hand_over.take()?;
        let mut taken = None;
        let log_of_connections = &self.logs.connections;
        if let Some(mut successor) = hand.applicants.step() {
            let mut session = Session {
                control: self,
                function: &mut *hand.function,
                successors: &hand.applicants,
                paused_at: 0,
                held: None,
                lent: None,
            };
            let pid = successor.successor();
            match hand_over(&mut session, &mut successor) {
                Outcome::Taken => {
                    let ms = (monotonic_ns() - session.paused_at) / 1_000_000;
                    log::info!("handed over to process {pid}, in {ms} ms");
                    taken = Some(pid);
                }
                Outcome::Kept(reason) => {
                    log_of_connections.warn(|| {
                        let reason: String = reason.escape_debug().take(500).collect();
                        format!("not handed over to process {pid}: {reason}; going on")
                    });
                }
            }
        }
        self.hand_over = Some(hand);
        taken
    }

    /// Goes on with a session that another process has served.
    ///
    /// # Errors
    /// It cannot be restored, and `settle` has been told; or it could not be ended after that.
    pub(super) fn inherit(&mut self, inheritance: Inheritance) -> Result<(), Error> {
        let Inheritance { front_end, write_cache, crashed, mut descriptors, settle, open_store } = inheritance;
        let restored = self.restore(front_end.as_ref(), &mut descriptors, (write_cache, crashed));
        settle(restored.as_ref().copied());
        drop(descriptors);
        *self.store = open_store();
        if let Some(connection) = &self.connection {
            self.board.post_front_end(connection.session().peer());
            self.board.post_memory(connection.session().memory());
            self.poller.add_edge(connection.socket().as_fd(), FRONT_END).map_err(Error::system("epoll_ctl"))?;
        }
        if let Err(error) = restored {
            return self.disconnect(&error.to_string());
        }
        // Before a ring runs: a crash finds the session of this process in the store, or that of the process before.
        if let Some(store) = self.store {
            store.begin();
        }
        self.save();
        if let Some(connection) = &self.connection {
            // Rings first: a shim may take its time to answer.
            connection.session().resume();
            connection.session().confirm_registration();
            self.pending = true;
        }
        Ok(())
    }

    fn restore(
        &mut self,
        front_end: Option<&FrontEnd>,
        descriptors: &mut Incoming,
        (write_cache, crashed): (Option<bool>, bool),
    ) -> Result<(), Error> {
        if let Some(front_end) = front_end {
            let connection = Connection::inherit(front_end, descriptors, self.device, self.logs)?;
            let connection = self.connection.insert(connection);
            connection.session().restore(front_end, descriptors)?;
            if crashed {
                connection.session().rebase_after_crash();
            }
        }
        if let Some(on) = write_cache.filter(|_| self.device.engine.geometry().volatile_cache) {
            self.device.engine.set_write_cache(on)?;
        }
        Ok(())
    }
}
