//! The loop of the one thread that serves a function over vfio-user: the listening socket, the front-end's, the shim's in
//! the front-end's process, the host's request for the function, and a stop descriptor.
//!
//! ```text
//!             front-end connects: reset           it leaves, or breaks the protocol: reset, unmapped
//!  Waiting ───────────────────────────▶ Serving ────────────────────────────────────────▶ Waiting …
//!     │                                    │  the host wants the function: the virtual machine is asked to unplug it
//!     │                                    ▼
//!     ├──── the host wants the function ── Asked ─── it leaves, or 10 s have passed ──▶ end
//!     └──────────── stop ──────────────────┴──▶ end
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::connection::{Connection, Received};
use super::error::Error;
use super::holder::Holder;
use super::session::{Answered, Session};
use crate::kvm::Vmm;
use crate::passthrough::Passthrough;
use crate::rate_limited_log::RateLimitedLog;
use crate::socket::{Endpoint, Listener, Peer, Socket};
use crate::sys::{Event, Poller};

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const FRONT_END: u64 = 2;
const REQUEST: u64 = 3;
const SHIM: u64 = 4;

/// How long the virtual machine may take to unplug the function when the host wants it back. The kernel asks again every
/// 10 s (`vfio_unregister_group_dev`), and the administrator's command waits meanwhile.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long to leave the listening socket alone after `accept` has failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// The one front-end of a connected socket has left.
    FrontEndLeft,
    /// The host wants the function; it is free when the server has been dropped.
    HostWantsFunction,
}

/// Serves one function to one virtual machine at a time.
pub struct Server {
    endpoint: Endpoint,
    device: Passthrough,
    vmm: Vmm,
}

impl Server {
    /// Serves `device` to those who come by `endpoint`; `vmm` is told of it.
    #[must_use]
    pub fn new(endpoint: Endpoint, device: Passthrough, vmm: Vmm) -> Self {
        Self { endpoint, device, vmm }
    }

    /// What is served.
    #[must_use]
    pub fn device(&self) -> &Passthrough {
        &self.device
    }

    /// The virtual machine's process.
    #[must_use]
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// Serves front-ends until there is a reason to end. Nothing is mapped afterwards, and the function does no DMA.
    ///
    /// # Errors
    /// The loop cannot go on. A front-end's mistakes only end its own conversation.
    pub fn run(&self, stop: &OwnedFd) -> Result<Ended, Error> {
        let poller = Poller::new().map_err(Error::system("epoll_create1"))?;
        poller.add(stop, STOP).map_err(Error::system("epoll_ctl"))?;
        poller.add(self.device.request(), REQUEST).map_err(Error::system("epoll_ctl"))?;
        let newcomers = RateLimitedLog::new(module_path!());
        let mut serving = Serving {
            server: self,
            poller,
            current: None,
            pending: false,
            holder: None,
            asked: None,
            newcomers,
            leaving: newcomers,
        };
        match &self.endpoint.0 {
            Socket::Listening(listener) => {
                serving.poller.add(&listener.socket, LISTENER).map_err(Error::system("epoll_ctl"))?;
                serving.serve(Some(listener))
            }
            Socket::Connected(socket) => {
                let socket = socket.try_clone().map_err(Error::system("duplicate the socket"))?;
                serving.accept(socket)?;
                serving.serve(None)
            }
        }
    }
}

/// The front-end that is served.
struct Current<'d> {
    connection: Connection,
    session: Session<'d>,
}

/// What a wait has found.
#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    front_end: bool,
    request: bool,
    shim: bool,
}

/// The loop's state.
struct Serving<'d> {
    server: &'d Server,
    poller: Poller,
    current: Option<Current<'d>>,
    /// The front-end's socket may hold more than has been looked at; its arrival has been reported already.
    pending: bool,
    /// Who may still hold a descriptor of the function.
    holder: Option<Holder>,
    /// When the virtual machine was asked for the function.
    asked: Option<Instant>,
    /// Lines about newcomers: one that is sent away may come again at once.
    newcomers: RateLimitedLog,
    /// Lines about front-ends that come and go.
    leaving: RateLimitedLog,
}

impl Serving<'_> {
    fn serve(&mut self, listener: Option<&Listener>) -> Result<Ended, Error> {
        loop {
            let ready = self.wait()?;
            if ready.stop {
                self.disconnect("stopping")?;
                return Ok(Ended::Stopped);
            }
            if ready.request {
                self.request_unplug()?;
            }
            if ready.shim {
                self.hear_shim();
            }
            if self.pending || ready.front_end {
                self.serve_message()?;
            }
            self.check_deadlines()?;
            match (&self.current, self.asked, listener) {
                (None, Some(_), _) => return Ok(Ended::HostWantsFunction),
                (None, None, None) => return Ok(Ended::FrontEndLeft),
                (_, None, Some(listener)) if ready.listener => self.welcome(listener)?,
                _ => {}
            }
        }
    }

    fn wait(&mut self) -> Result<Ready, Error> {
        let mut ready = Ready::default();
        let note = |event: Event| match event.token {
            STOP => ready.stop = true,
            LISTENER => ready.listener = true,
            REQUEST => ready.request = true,
            SHIM => ready.shim = true,
            _ => ready.front_end = true,
        };
        let timeout = if self.pending { Some(Duration::ZERO) } else { self.until_deadline() };
        self.poller.wait(timeout, note).map_err(Error::system("epoll_wait"))?;
        Ok(ready)
    }

    fn until_deadline(&self) -> Option<Duration> {
        let message = self.current.as_ref().and_then(|current| current.connection.deadline());
        let request = self.asked.map(|asked| asked + REQUEST_PATIENCE);
        let next = message.into_iter().chain(request).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn check_deadlines(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let stalled = self.current.as_ref().map_or(Ok(()), |current| current.connection.check_deadline(now));
        if let Err(error) = stalled {
            self.disconnect(&error.to_string())?;
        }
        if self.asked.is_some_and(|asked| asked + REQUEST_PATIENCE <= now) {
            self.disconnect("the host wants the device back, and the virtual machine has not unplugged it in 10 s")?;
        }
        Ok(())
    }

    /// Serves at most one message, so that a front-end that sends without end delays nobody else.
    fn serve_message(&mut self) -> Result<(), Error> {
        let Some(Current { connection, session }) = &mut self.current else {
            self.pending = false;
            return Ok(());
        };
        let message = match connection.receive() {
            Ok(Received::Message(message)) => message,
            Ok(Received::Incomplete) => {
                self.pending = false;
                return Ok(());
            }
            Ok(Received::Gone) => return self.disconnect("it has left"),
            Err(error) => return self.disconnect(&error.to_string()),
        };
        self.pending = true;
        let (answered, outcome) = session.handle(message);
        let sent = match answered {
            Answered::Reply(header, reply) => connection.answer(header, reply),
            Answered::Silent => Ok(()),
        };
        match outcome.and(sent) {
            Ok(()) => self.watch_shim(),
            Err(error) => self.disconnect(&error.to_string()),
        }
    }

    fn watch_shim(&mut self) -> Result<(), Error> {
        let Some(current) = &mut self.current else { return Ok(()) };
        match current.session.link().take_new_socket() {
            Some(shim) => self.poller.add(shim, SHIM).map_err(Error::system("epoll_ctl")),
            None => Ok(()),
        }
    }

    /// The shim has something to say without having been asked: it has gone.
    fn hear_shim(&mut self) {
        if let Some(current) = &mut self.current {
            current.session.link().on_shim_event(false);
        }
    }

    /// The host wants the function: asks the virtual machine to unplug it.
    fn request_unplug(&mut self) -> Result<(), Error> {
        let request = self.server.device.request();
        rustix::io::read(request, &mut [0; 8]).map_err(Error::system("read the request event"))?;
        if self.asked.is_none() {
            let asked = self.current.as_ref().is_some_and(|current| current.session.request_unplug());
            let name = self.server.device.name();
            log::warn!(
                "{name}: the host wants the device back; {}",
                match (&self.current, asked) {
                    (None, _) => "nobody uses it",
                    (_, true) => "the virtual machine is asked to unplug it, and has 10 s",
                    (_, false) => "the virtual machine has not said how to ask it, and has 10 s",
                }
            );
        }
        self.asked.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Takes the next front-end in, or sends it away if there is one already.
    fn welcome(&mut self, listener: &Listener) -> Result<(), Error> {
        let socket = match listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.newcomers.error(|| format!("accept: {error}"));
                std::thread::sleep(ACCEPT_PAUSE);
                return Ok(());
            }
        };
        let Some(Current { session, .. }) = &self.current else { return self.accept(socket) };
        self.newcomers.warn(|| {
            let newcomer = Peer::of(&socket).map_or_else(|error| error.to_string(), |peer| peer.to_string());
            format!("sent {newcomer} away: this device is being used by {}", session.peer())
        });
        Ok(())
    }

    fn accept(&mut self, socket: UnixStream) -> Result<(), Error> {
        let peer = Peer::of(&socket).map_err(Error::system("getsockopt(SO_PEERCRED)"))?;
        if let Some(holder) = self.holder.as_ref().filter(|holder| !holder.admits(peer.pid())) {
            self.newcomers.error(|| {
                let pid = holder.pid();
                format!("sent {peer} away: process {pid} still holds this device's file, and could reach its registers")
            });
            return Ok(());
        }
        let connection = Connection::new(socket).map_err(Error::system("set O_NONBLOCK"))?;
        let session = Session::new(&self.server.device, &self.server.vmm, peer);
        self.leaving.info(|| format!("front-end connected: {}", session.peer()));
        let watched = self.poller.add_duplex(connection.socket().as_fd(), FRONT_END);
        watched.map_err(Error::system("epoll_ctl"))?;
        self.current = Some(Current { connection, session });
        self.pending = true;
        Ok(())
    }

    /// Ends the conversation: the function is reset, its interrupts are off, memory is unmapped, the socket closed.
    fn disconnect(&mut self, why: &str) -> Result<(), Error> {
        let Some(Current { connection, session }) = self.current.take() else { return Ok(()) };
        self.pending = false;
        let start = Instant::now();
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        let (peer, counters) = (session.peer().to_string(), session.counters());
        self.holder = session.close();
        let took = start.elapsed().as_millis();
        self.leaving.info(|| {
            format!("front-end disconnected: {peer}: {why}; device reset, memory unmapped in {took} ms; {counters}")
        });
        Ok(())
    }
}
