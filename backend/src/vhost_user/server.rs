//! The control thread: one loop over the listening socket, the front-end's socket, the shim's in the front-end's process, and
//! a stop descriptor. It sleeps until one of them wants something, or guest memory is to be looked after.
//!
//! ```text
//!             front-end connects            it leaves, or is sent away
//!  Waiting ────────────────────────▶ Serving ────────────────────────▶ Waiting …
//!     │                                 │   meanwhile any other front-end is closed at once
//!     └──────────── stop ───────────────┴──▶ end: rings drained, memory given back
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::connection::{Connection, Progress};
use super::{Device, Error};
use crate::rate_limited_log::RateLimitedLog;
use crate::socket::{Endpoint, Listener, Peer, Socket};
use crate::sys::Poller;

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const FRONT_END: u64 = 2;
const NOTICE: u64 = 3;
const SHIM: u64 = 4;
const RELEASED: u64 = 5;

/// How long to leave the listening socket alone after `accept` has failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves one device to one front-end at a time.
pub struct Server {
    endpoint: Endpoint,
    device: Device,
    notice: Arc<OwnedFd>,
}

/// Tells a server's control thread, from any other, what a front-end should know.
#[derive(Clone)]
pub struct Announcer {
    notice: Arc<OwnedFd>,
}

impl Announcer {
    /// The disk's configuration space reads differently now: its size has changed, say. The front-end is told if there is
    /// one; one that comes later reads it anyway.
    pub fn config_changed(&self) {
        // Full (EAGAIN) is as good as written: the server has not looked yet.
        let _ = rustix::io::write(&*self.notice, &1_u64.to_ne_bytes());
    }
}

/// What a wait has found.
#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    front_end: bool,
    notice: bool,
    shim: bool,
    released: bool,
}

impl Server {
    /// Front-ends that have connected meanwhile are served by [`Self::run`].
    ///
    /// # Errors
    /// The errno of `eventfd`.
    pub fn new(endpoint: Endpoint, device: Device) -> Result<Self, Error> {
        let notice = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::system("eventfd"))?;
        Ok(Self { endpoint, device, notice: Arc::new(notice) })
    }

    /// Has front-ends told when the disk's size changes.
    pub fn tell_changes(&self) {
        let announcer = self.announcer();
        self.device.engine.on_change(move || announcer.config_changed());
    }

    /// For whoever learns that the disk has changed.
    #[must_use]
    pub fn announcer(&self) -> Announcer {
        Announcer { notice: Arc::clone(&self.notice) }
    }

    /// Serves front-ends until `stop` becomes readable or, on a connected socket, until the front-end leaves. No ring runs
    /// and no guest memory is mapped afterwards.
    ///
    /// # Errors
    /// The control loop or the engine cannot go on. A front-end's mistakes only end its own conversation.
    pub fn run(&mut self, stop: OwnedFd) -> Result<(), Error> {
        let poller = Poller::new().map_err(Error::system("epoll_create1"))?;
        poller.add(&stop, STOP).map_err(Error::system("epoll_ctl"))?;
        poller.add(&*self.notice, NOTICE).map_err(Error::system("epoll_ctl"))?;
        poller.add(self.device.engine.released(), RELEASED).map_err(Error::system("epoll_ctl"))?;
        let (device, notice) = (&self.device, &*self.notice);
        let mut serving = Serving {
            device,
            notice,
            poller,
            connection: None,
            pending: false,
            newcomers: RateLimitedLog::new(module_path!()),
        };
        match &self.endpoint.0 {
            Socket::Listening(listener) => {
                serving.poller.add(&listener.socket, LISTENER).map_err(Error::system("epoll_ctl"))?;
                serving.serve_all(listener)
            }
            Socket::Connected(socket) => {
                let socket = socket.try_clone().map_err(Error::system("duplicate the socket"))?;
                serving.adopt(socket)?;
                serving.serve_one()
            }
        }
    }

    /// Gives the device back, to be shut down; the socket is closed and, if it was made here, removed.
    #[must_use]
    pub fn into_device(self) -> Device {
        self.device
    }
}

/// The loop's state.
struct Serving<'d> {
    device: &'d Device,
    notice: &'d OwnedFd,
    poller: Poller,
    connection: Option<Connection<'d>>,
    /// The front-end's socket may hold a whole message; its arrival has been reported already.
    pending: bool,
    /// Lines about newcomers: one that is sent away may come again at once.
    newcomers: RateLimitedLog,
}

impl Serving<'_> {
    fn serve_all(&mut self, listener: &Listener) -> Result<(), Error> {
        loop {
            let ready = self.wait()?;
            if ready.stop {
                return self.disconnect("stopping");
            }
            self.step(&ready)?;
            // A front-end that has left makes room before the next one is looked at: many close and connect again.
            let leaving = self.connection.as_ref().is_some_and(|connection| connection.hung_up().unwrap_or(true));
            if leaving {
                self.pending = true;
            } else if ready.listener {
                self.welcome(listener)?;
            }
        }
    }

    fn serve_one(&mut self) -> Result<(), Error> {
        while self.connection.is_some() {
            let ready = self.wait()?;
            if ready.stop {
                return self.disconnect("stopping");
            }
            self.step(&ready)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<Ready, Error> {
        let mut ready = Ready::default();
        let timeout = if self.pending { Some(Duration::ZERO) } else { self.until_next_look() };
        let note = |event: crate::sys::Event| match event.token {
            STOP => ready.stop = true,
            LISTENER => ready.listener = true,
            NOTICE => ready.notice = true,
            SHIM => ready.shim = true,
            RELEASED => ready.released = true,
            _ => ready.front_end = true,
        };
        self.poller.wait(timeout, note).map_err(Error::system("epoll_wait"))?;
        Ok(ready)
    }

    /// `None`: nothing is to be looked after, so nobody need wake up.
    fn until_next_look(&self) -> Option<Duration> {
        let next = self.connection.as_ref()?.session().next_discard_check()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn step(&mut self, ready: &Ready) -> Result<(), Error> {
        if ready.notice {
            rustix::io::read(self.notice, &mut [0; 8]).map_err(Error::system("read a notice"))?;
            if let Some(connection) = &self.connection {
                connection.session().config_changed();
            }
        }
        self.serve_message(ready)?;
        self.attend_vmm(ready)
    }

    /// What concerns the front-end's process as a whole, after what it said itself.
    fn attend_vmm(&mut self, ready: &Ready) -> Result<(), Error> {
        if ready.released {
            self.poller.remove(self.device.engine.released()).map_err(Error::system("epoll_ctl"))?;
            self.device.vmm.release();
        }
        let Some(connection) = &self.connection else { return Ok(()) };
        let front_end_goes = ready.shim && connection.hangs_up_soon();
        let mut session = connection.session();
        if ready.shim {
            session.on_shim_event(front_end_goes);
        }
        if ready.released {
            session.on_device_released();
        }
        session.look();
        match session.new_shim_socket() {
            Some(shim) => self.poller.add(shim, SHIM).map_err(Error::system("epoll_ctl")),
            None => Ok(()),
        }
    }

    /// Serves one message of the front-end, if it may have sent one.
    fn serve_message(&mut self, ready: &Ready) -> Result<(), Error> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if !self.pending && !ready.front_end {
            return Ok(());
        }
        match connection.serve() {
            Ok(Progress::Served) => self.pending = true,
            Ok(Progress::Idle) => self.pending = false,
            Ok(Progress::Gone) => self.disconnect("it has left")?,
            Err(error) => self.disconnect(&error.to_string())?,
        }
        Ok(())
    }

    /// Takes the next front-end in, or sends it away if there is one already.
    fn welcome(&mut self, listener: &Listener) -> Result<(), Error> {
        let socket = match listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return Ok(()),
            Err(error) => {
                log::error!("accept: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
                return Ok(());
            }
        };
        let Some(connection) = &self.connection else { return self.adopt(socket) };
        self.newcomers.warn(|| {
            let newcomer = Peer::of(&socket).map_or_else(|error| error.to_string(), |peer| peer.to_string());
            format!("sent {newcomer} away: this device is being used by {}", connection.session().peer())
        });
        Ok(())
    }

    fn adopt(&mut self, socket: UnixStream) -> Result<(), Error> {
        let connection = Connection::new(socket, self.device).map_err(Error::system("take a connection"))?;
        log::info!("front-end connected: {}", connection.session().peer());
        self.poller.add_edge(connection.socket().as_fd(), FRONT_END).map_err(Error::system("epoll_ctl"))?;
        self.connection = Some(connection);
        self.pending = true;
        Ok(())
    }

    /// Ends the conversation: rings drained, memory given back, socket closed.
    fn disconnect(&mut self, why: &str) -> Result<(), Error> {
        let Some(connection) = self.connection.take() else { return Ok(()) };
        self.pending = false;
        let start = Instant::now();
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        let mut session = connection.session();
        let closed = session.close();
        let took = start.elapsed().as_millis();
        log::info!("front-end disconnected: {}: {why}; rings stopped, memory unmapped in {took} ms", session.peer());
        closed
    }
}
