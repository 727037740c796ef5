//! The control thread: one loop over the listening socket, the front-end's socket, the shim's socket and the stop eventfd.
//! It sleeps until one of them is ready, or the next check of guest memory is due.
//!
//! ```text
//!             front-end connects         it disconnects, or is disconnected
//!  Waiting ────────────────────────▶ Serving ────────────────────────▶ Waiting …
//!     │                                 │   any other front-end is rejected meanwhile, or waits to take its place (`next.rs`)
//!     └──────────── stop ───────────────┴──▶ end: vrings drained, memory unmapped
//! ```

mod front_ends;
mod next;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::config_notifier::ConfigNotifier;
use super::connection::{Connection, Progress};
use super::hand_over::{HandOver, Inheritance};
use super::logs::Logs;
use super::succession::Succession;
use super::{Device, Error};
use crate::board::Board;
use crate::service_manager::{FdStore, Heartbeat};
use crate::socket::{Endpoint, Listener, Socket};
use crate::sys::Poller;
use next::{Downtime, Former, Next};

const STOP: u64 = 0;
const LISTENER: u64 = 1;
pub(super) const FRONT_END: u64 = 2;
const CONFIG_CHANGE: u64 = 3;
const SHIM: u64 = 4;
const RELEASED: u64 = 5;
const SUCCESSOR: u64 = 6;
const HEARTBEAT: u64 = 7;
const NEXT: u64 = 8;

/// Serves one device to one front-end at a time.
pub struct Server {
    endpoint: Endpoint,
    device: Device,
    /// Eventfd, signalled by a [`ConfigNotifier`].
    config_change: Arc<OwnedFd>,
    logs: Logs,
    board: Arc<Board>,
    heartbeat: Option<Heartbeat>,
    hand_over: Option<HandOver>,
    /// The process that has taken the session.
    successor: Option<u32>,
    store: Option<FdStore>,
    succession: Succession,
}

/// The sources of events that are ready.
#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    front_end: bool,
    config_change: bool,
    shim: bool,
    released: bool,
    successor: bool,
    next: bool,
}

impl Server {
    /// A server that is not running yet. A front-end that connects before [`Self::run`] waits in the backlog.
    ///
    /// # Errors
    /// The errno of `eventfd`.
    pub fn new(endpoint: Endpoint, device: Device) -> Result<Self, Error> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::system("eventfd"))?;
        Ok(Self {
            endpoint,
            device,
            config_change: Arc::new(event),
            logs: Logs::new(),
            board: Arc::default(),
            heartbeat: None,
            hand_over: None,
            successor: None,
            store: None,
            succession: Succession::default(),
        })
    }

    /// Makes the engine notify front-ends of changes of the disk's size.
    pub fn notify_config_changes(&self) {
        let notifier = self.config_notifier();
        self.device.engine.on_change(move || notifier.config_changed());
    }

    /// Lets others know who is connected.
    pub fn post_on(&mut self, board: &Arc<Board>) {
        self.board = Arc::clone(board);
    }

    /// Tells the service manager that the control thread is alive.
    pub fn beat(&mut self, heartbeat: Option<Heartbeat>) {
        self.heartbeat = heartbeat;
    }

    /// Lets another process take the session. [`Self::successor`] tells whether one has.
    pub fn allow_hand_over(&mut self, hand_over: HandOver) {
        self.hand_over = Some(hand_over);
    }

    /// Lets a front-end wait while another one is served, as far as `succession` permits.
    pub fn allow_succession(&mut self, succession: &Succession) {
        self.succession = succession.clone();
    }

    /// The process that has taken the session. Nothing of it may be touched any more: this process must end without dropping the
    /// server.
    #[must_use]
    pub fn successor(&self) -> Option<u32> {
        self.successor
    }

    /// A handle for reporting changes of the configuration space.
    #[must_use]
    pub fn config_notifier(&self) -> ConfigNotifier {
        ConfigNotifier { config_change: Arc::clone(&self.config_change) }
    }

    /// Serves front-ends until `stop` becomes readable or, on a connected socket, until the front-end disconnects. After
    /// that, no vring runs and no guest memory is mapped.
    ///
    /// # Errors
    /// The control loop or the engine has failed. An error caused by a front-end ends only its connection.
    pub fn run(&mut self, stop: OwnedFd) -> Result<(), Error> {
        self.run_with(stop, None)
    }

    /// As [`Self::run`], and first goes on with the session of another process.
    ///
    /// # Errors
    /// As for [`Self::run`], or the session cannot be restored.
    pub fn run_with(&mut self, stop: OwnedFd, inheritance: Option<Inheritance>) -> Result<(), Error> {
        let poller = Poller::new().map_err(Error::system("epoll_create1"))?;
        poller.add(&stop, STOP).map_err(Error::system("epoll_ctl"))?;
        poller.add(&*self.config_change, CONFIG_CHANGE).map_err(Error::system("epoll_ctl"))?;
        poller.add(self.device.engine.released(), RELEASED).map_err(Error::system("epoll_ctl"))?;
        if let Some(heartbeat) = &self.heartbeat {
            poller.add(heartbeat, HEARTBEAT).map_err(Error::system("epoll_ctl"))?;
        }
        if let Some(hand_over) = &self.hand_over {
            poller.add(hand_over.applicants.event(), SUCCESSOR).map_err(Error::system("epoll_ctl"))?;
        }
        let Self { endpoint, device, config_change, logs, board, heartbeat, hand_over, successor, store, succession } =
            self;
        let (connection, pending, hand_over) = (None, false, hand_over.take());
        let mut control = ControlLoop {
            endpoint,
            device,
            config_change,
            poller,
            connection,
            pending,
            logs,
            board,
            heartbeat,
            hand_over,
            successor,
            store,
            succession,
            next: None,
            downtime: None,
            former: None,
        };
        let served = control.serve(inheritance);
        // Its socket file is not removed before the server is dropped, which it is not if the session was handed over.
        self.hand_over = control.hand_over.take();
        served
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the device, for its shutdown. The socket is closed; a socket file that was created here is removed.
    #[must_use]
    pub fn into_device(self) -> Device {
        self.device
    }
}

/// The state of [`Server::run`].
pub(super) struct ControlLoop<'d> {
    pub(super) endpoint: &'d Endpoint,
    pub(super) device: &'d Device,
    config_change: &'d OwnedFd,
    pub(super) poller: Poller,
    pub(super) connection: Option<Connection<'d>>,
    /// The front-end's socket may hold a whole message. Its event is edge-triggered and has been consumed.
    pub(super) pending: bool,
    pub(super) logs: &'d Logs,
    pub(super) board: &'d Board,
    heartbeat: &'d Option<Heartbeat>,
    pub(super) hand_over: Option<HandOver>,
    /// See [`Server::successor`].
    successor: &'d mut Option<u32>,
    pub(super) store: &'d mut Option<FdStore>,
    succession: &'d Succession,
    /// The front-end that waits.
    pub(super) next: Option<Next<'d>>,
    downtime: Option<Downtime>,
    /// The front-end that has given way to the one that is served.
    former: Option<Former<'d>>,
}

impl ControlLoop<'_> {
    fn serve(&mut self, inheritance: Option<Inheritance>) -> Result<(), Error> {
        if let Some(inheritance) = inheritance {
            self.inherit(inheritance)?;
        }
        match &self.endpoint.0 {
            Socket::Listening(listener) => {
                self.poller.add(&listener.socket, LISTENER).map_err(Error::system("epoll_ctl"))?;
                self.serve_all(listener)
            }
            Socket::Connected(socket) => {
                if self.connection.is_none() {
                    let socket = socket.try_clone().map_err(Error::system("duplicate the socket"))?;
                    self.adopt(socket)?;
                }
                self.serve_one()
            }
        }
    }

    fn serve_all(&mut self, listener: &Listener) -> Result<(), Error> {
        loop {
            let ready = self.wait()?;
            if ready.stop {
                return self.stop();
            }
            if self.is_handed_over(&ready) {
                return Ok(());
            }
            self.step(&ready)?;
            // Many front-ends close and connect again. The old connection must end before the new one is accepted, or the
            // new one would be rejected.
            let hung_up = self.connection.as_ref().is_some_and(|connection| connection.hung_up().unwrap_or(true));
            if hung_up {
                self.pending = true;
            } else if ready.listener {
                self.accept(listener)?;
            }
        }
    }

    fn serve_one(&mut self) -> Result<(), Error> {
        while self.connection.is_some() {
            let ready = self.wait()?;
            if ready.stop {
                return self.stop();
            }
            if self.is_handed_over(&ready) {
                return Ok(());
            }
            self.step(&ready)?;
        }
        Ok(())
    }

    /// Leaves the session to the next process if the service manager keeps it, else ends it.
    fn stop(&mut self) -> Result<(), Error> {
        self.send_next_away("stopping")?;
        self.end_former()?;
        if self.leave_stored()? { Ok(()) } else { self.disconnect("stopping") }
    }

    /// Hears successors. True if one has taken the session.
    fn is_handed_over(&mut self, ready: &Ready) -> bool {
        if ready.successor {
            // The address space moves with guest memory of one front-end.
            if let Err(error) = self.end_former() {
                self.logs.connections.error(|| error.to_string());
            }
            *self.successor = self.hear_successors();
        }
        self.successor.is_some()
    }

    fn wait(&mut self) -> Result<Ready, Error> {
        let mut ready = Ready::default();
        let timeout = if self.is_pending() { Some(Duration::ZERO) } else { self.until_next_check() };
        let mark = |event: crate::sys::Event| match event.token {
            STOP => ready.stop = true,
            LISTENER => ready.listener = true,
            CONFIG_CHANGE => ready.config_change = true,
            SHIM => ready.shim = true,
            RELEASED => ready.released = true,
            SUCCESSOR => ready.successor = true,
            NEXT => ready.next = true,
            HEARTBEAT => self.heartbeat.iter().for_each(Heartbeat::beat),
            _ => ready.front_end = true,
        };
        self.poller.wait(timeout, mark).map_err(Error::system("epoll_wait"))?;
        Ok(ready)
    }

    /// Time until the next check for discarded memory, or of the downtime; `None` if there is none.
    fn until_next_check(&self) -> Option<Duration> {
        if self.downtime.is_some() {
            return Some(Downtime::INTERVAL);
        }
        let next = self.connection.as_ref()?.session().next_discard_check()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn step(&mut self, ready: &Ready) -> Result<(), Error> {
        if ready.config_change {
            rustix::io::read(self.config_change, &mut [0; 8]).map_err(Error::system("read an eventfd"))?;
            if let Some(connection) = &self.connection {
                connection.session().config_changed();
            }
            if let Some(next) = &self.next {
                next.config_changed();
            }
        }
        self.serve_message(ready)?;
        self.serve_next(ready)?;
        self.update_vmm(ready)
    }

    /// Handles events of the shim and of the device, checks for discarded memory, and watches a new shim socket.
    fn update_vmm(&mut self, ready: &Ready) -> Result<(), Error> {
        if ready.released {
            self.poller.remove(self.device.engine.released()).map_err(Error::system("epoll_ctl"))?;
            self.device.vmm.release();
            if self.device.vmm.registers() {
                self.send_next_away("the host keeps the device")?;
            }
        }
        let Some(connection) = &self.connection else { return Ok(()) };
        let front_end_exits = ready.shim && connection.hangs_up_soon();
        let mut session = connection.session();
        if ready.shim {
            session.on_shim_event(front_end_exits);
        }
        if ready.released {
            session.on_device_released();
        }
        session.check_discards();
        match session.new_shim_socket() {
            Some(shim) => self.poller.add(shim, SHIM).map_err(Error::system("epoll_ctl")),
            None => Ok(()),
        }
    }

    /// Serves one message of the front-end, if there is one.
    fn serve_message(&mut self, ready: &Ready) -> Result<(), Error> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if !self.pending && !ready.front_end {
            return Ok(());
        }
        if let Some(store) = self.store {
            store.begin();
        }
        match connection.serve() {
            Ok(Progress::Served) => self.pending = true,
            Ok(Progress::Idle) => {
                self.board.post_memory(connection.session().memory());
                self.pending = false;
                self.save();
            }
            Ok(Progress::Disconnected) => self.disconnect("it has left")?,
            Err(error) => self.disconnect(&error.to_string())?,
        }
        Ok(())
    }
}
