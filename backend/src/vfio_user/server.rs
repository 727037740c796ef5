//! The event loop that serves a function over vfio-user, in one thread. It polls the listening socket, the front-end's socket,
//! the socket of the shim in the front-end's process, the host's request for the function, and a stop descriptor.
//!
//! ```text
//!             front-end connects: reset           it leaves, or breaks the protocol: reset, unmap
//!  Waiting ───────────────────────────▶ Serving ────────────────────────────────────────▶ Waiting …
//!     │                                    │  if it was given the device's own file, the function is closed and acquired
//!     │                                    │  anew as soon as nobody has that file any more
//!     │                                    │  the host wants the function: ask the virtual machine to unplug it
//!     │                                    ▼
//!     ├──── the host wants the function ── Unplugging ─── it leaves, or 10 s have passed ──▶ end
//!     └──────────── stop ──────────────────┴──▶ end
//! ```

mod current;
mod host_request;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use current::{Current, VERSION_TIMEOUT};

use super::connection::{Connection, Received};
use super::error::Error;
use super::session::{Response, Session};
use crate::board::Board;
use crate::kvm::Vmm;
use crate::passthrough::{Passthrough, PassthroughError};
use crate::qmp::Monitor;
use crate::rate_limited_log::SharedLog;
use crate::service_manager::Heartbeat;
use crate::socket::{Endpoint, Listener, Peer, Socket};
use crate::sys::{Event, Poller};

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const FRONT_END: u64 = 2;
const REQUEST: u64 = 3;
const SHIM: u64 = 4;
const HEARTBEAT: u64 = 5;

/// Time-out for the virtual machine to unplug the function when the host wants it back. The kernel repeats its request every
/// 10 s (`vfio_unregister_group_dev`), and the administrator's command blocks meanwhile.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two attempts to acquire a closed function anew while no front-end asks for it.
const REACQUIRE_PAUSE: Duration = Duration::from_secs(1);
/// Pause after `accept` has failed, as it does for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why [`Server::run`] has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The stop descriptor is readable.
    Stopped,
    /// The only front-end of a connected socket has left.
    FrontEndLeft,
    /// The host wants the function. The function is closed when the server is dropped.
    HostWantsFunction,
}

/// Serves one function to one virtual machine at a time.
pub struct Server {
    endpoint: Endpoint,
    device: Passthrough,
    vmm: Vmm,
    /// Asked to unplug the function when the host requests it, if the front-end has set no eventfd for that.
    monitor: Option<Arc<Monitor>>,
    /// Messages that were refused.
    refusals: SharedLog,
    board: Arc<Board>,
    heartbeat: Option<Heartbeat>,
}

impl Server {
    /// Serves `device` to front-ends that connect to `endpoint`, and registers it with `vmm`.
    #[must_use]
    pub fn new(endpoint: Endpoint, device: Passthrough, vmm: Vmm) -> Self {
        Self {
            endpoint,
            device,
            vmm,
            monitor: None,
            refusals: SharedLog::new(module_path!()),
            board: Arc::default(),
            heartbeat: None,
        }
    }

    /// Has this monitor asked to unplug the function when the host requests it, of a front-end that cannot be asked itself.
    #[must_use]
    pub fn with_monitor(self, monitor: Monitor) -> Self {
        Self { monitor: Some(Arc::new(monitor)), ..self }
    }

    /// Lets others know who is connected.
    pub fn post_on(&mut self, board: &Arc<Board>) {
        self.board = Arc::clone(board);
    }

    /// Tells the service manager that the loop is alive.
    pub fn beat(&mut self, heartbeat: Option<Heartbeat>) {
        self.heartbeat = heartbeat;
    }

    /// The function.
    #[must_use]
    pub fn device(&self) -> &Passthrough {
        &self.device
    }

    /// The virtual machine's process.
    #[must_use]
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// Serves front-ends until a reason to end occurs. Afterwards nothing is mapped, and the function does no DMA.
    ///
    /// # Errors
    /// A system call of the loop has failed. Errors of a front-end only close its own connection.
    pub fn run(&self, stop: &OwnedFd) -> Result<EndReason, Error> {
        let poller = Poller::new().map_err(Error::system("epoll_create1"))?;
        poller.add(stop, STOP).map_err(Error::system("epoll_ctl"))?;
        poller.add(self.device.request(), REQUEST).map_err(Error::system("epoll_ctl"))?;
        if let Some(heartbeat) = &self.heartbeat {
            poller.add(heartbeat, HEARTBEAT).map_err(Error::system("epoll_ctl"))?;
        }
        let mut event_loop = EventLoop {
            server: self,
            stop: stop.as_fd(),
            poller,
            current: None,
            pending: false,
            unplug_since: None,
            reacquire_at: Instant::now(),
            reacquire_failures: 0,
            rejection_log: SharedLog::new(module_path!()),
            connection_log: SharedLog::new(module_path!()),
        };
        match &self.endpoint.0 {
            Socket::Listening(listener) => {
                event_loop.poller.add(&listener.socket, LISTENER).map_err(Error::system("epoll_ctl"))?;
                event_loop.serve(Some(listener))
            }
            Socket::Connected(socket) => {
                let socket = socket.try_clone().map_err(Error::system("duplicate the socket"))?;
                event_loop.adopt(socket)?;
                event_loop.serve(None)
            }
        }
    }
}

/// The descriptors that are ready.
#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    front_end: bool,
    request: bool,
    shim: bool,
}

struct EventLoop<'d> {
    server: &'d Server,
    stop: BorrowedFd<'d>,
    poller: Poller,
    current: Option<Current<'d>>,
    /// The front-end's socket may have more data. The poller is edge-triggered and does not report it again.
    pending: bool,
    /// When the host requested the function.
    unplug_since: Option<Instant>,
    /// When to try to acquire a closed function anew, and how many attempts have failed.
    reacquire_at: Instant,
    reacquire_failures: u32,
    /// Separate limits, so that a rejected front-end that reconnects all the time does not suppress the lines of others.
    rejection_log: SharedLog,
    connection_log: SharedLog,
}

impl EventLoop<'_> {
    fn serve(&mut self, listener: Option<&Listener>) -> Result<EndReason, Error> {
        loop {
            let ready = self.wait()?;
            if ready.stop {
                self.disconnect("stopping")?;
                return Ok(EndReason::Stopped);
            }
            if ready.request {
                self.request_unplug()?;
            }
            // First: a virtual machine that ends takes its shim with it, and then nothing has to be done about the shim.
            if self.pending || ready.front_end {
                self.serve_message()?;
            }
            if ready.shim {
                self.on_shim_event()?;
            }
            self.check_deadlines()?;
            if self.is_taken() {
                self.disconnect("the host has taken the device back")?;
                return Ok(EndReason::HostWantsFunction);
            }
            match (&self.current, self.unplug_since, listener) {
                (None, Some(_), _) => return Ok(EndReason::HostWantsFunction),
                (None, None, None) => return Ok(EndReason::FrontEndLeft),
                // Also while the function is to be unplugged: a newcomer who is left waiting keeps the socket readable.
                (_, _, Some(listener)) if ready.listener => self.accept(listener)?,
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
            HEARTBEAT => self.server.heartbeat.iter().for_each(Heartbeat::beat),
            _ => ready.front_end = true,
        };
        let timeout = if self.pending { Some(Duration::ZERO) } else { self.until_deadline() };
        self.poller.wait(timeout, note).map_err(Error::system("epoll_wait"))?;
        Ok(ready)
    }

    fn until_deadline(&self) -> Option<Duration> {
        let front_end = self.current.as_ref().and_then(Current::deadline);
        let unplug = self.unplug_since.map(|since| since + UNPLUG_TIMEOUT);
        let reacquire = self.server.device.is_closed().then_some(self.reacquire_at);
        let next = front_end.into_iter().chain(unplug).chain(reacquire).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn check_deadlines(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let stalled = self.current.as_ref().map_or(Ok(()), |current| current.check_deadline(now));
        if let Err(error) = stalled {
            self.disconnect(&error.to_string())?;
        }
        if self.unplug_since.is_some_and(|since| since + UNPLUG_TIMEOUT <= now) {
            self.disconnect("the host wants the device back, and the virtual machine has not unplugged it in 10 s")?;
        }
        Ok(())
    }

    /// Serves at most one message, so that a front-end that sends continuously does not block the other descriptors.
    fn serve_message(&mut self) -> Result<(), Error> {
        let Some(Current { connection, session, .. }) = &mut self.current else {
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
        let (response, outcome) = session.handle(message);
        let sent = match response {
            Response::Reply(header, reply) => connection.reply(header, reply),
            Response::None => Ok(()),
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

    /// The shim's socket is readable: the shim has gone. Without it KVM assumes coherent DMA, so a function whose DMA is not
    /// coherent is taken from the guest unless it could be registered once more.
    fn on_shim_event(&mut self) -> Result<(), Error> {
        let Some(Current { session, .. }) = &mut self.current else { return Ok(()) };
        session.link().on_shim_event(false);
        match session.link().check_registration() {
            Ok(()) => self.watch_shim(),
            Err(error) => self.disconnect(&error.to_string()),
        }
    }

    /// The host wants the function: asks the virtual machine to unplug it.
    fn request_unplug(&mut self) -> Result<(), Error> {
        let request = self.server.device.request();
        rustix::io::read(request, &mut [0; 8]).map_err(Error::system("read the request event"))?;
        if self.unplug_since.is_none() {
            let Server { device, monitor, .. } = self.server;
            let current = self.current.as_ref().map(|current| (&current.session, &current.connection));
            host_request::ask(device, monitor.as_ref(), current);
        }
        self.unplug_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Tries to acquire a closed function anew, if that is due. True if the host has taken the function meanwhile.
    fn is_taken(&mut self) -> bool {
        if !self.server.device.is_closed() || Instant::now() < self.reacquire_at {
            return false;
        }
        self.reacquire_at = Instant::now() + REACQUIRE_PAUSE;
        let result = self.server.device.reacquire();
        if let Err(error) = &result {
            self.reacquire_failures += 1;
            // A process that has just been killed is still ending at the first attempt.
            if self.reacquire_failures == 2 {
                self.connection_log.warn(|| error.to_string());
            }
        }
        matches!(result, Err(PassthroughError::Taken { .. }))
    }

    /// Accepts the next front-end; closes its connection if the device is in use.
    fn accept(&mut self, listener: &Listener) -> Result<(), Error> {
        let socket = match listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.rejection_log.error(|| format!("accept: {error}"));
                std::thread::sleep(ACCEPT_PAUSE);
                return Ok(());
            }
        };
        let Some(Current { session, .. }) = &self.current else { return self.adopt(socket) };
        self.rejection_log.warn(|| {
            let rejected = Peer::of(&socket).map_or_else(|error| error.to_string(), |peer| peer.to_string());
            format!("sent {rejected} away: this device is being used by {}", session.peer())
        });
        Ok(())
    }

    fn adopt(&mut self, socket: UnixStream) -> Result<(), Error> {
        let peer = Peer::of(&socket).map_err(Error::system("getsockopt(SO_PEERCRED)"))?;
        let connection = Connection::new(socket).map_err(Error::system("set O_NONBLOCK"))?;
        let session = Session::new(&self.server.device, &self.server.vmm, &self.server.refusals, peer, self.stop);
        self.connection_log.info(|| format!("front-end connected: {}", session.peer()));
        self.server.board.post_front_end(session.peer());
        let watched = self.poller.add_duplex(connection.socket().as_fd(), FRONT_END);
        watched.map_err(Error::system("epoll_ctl"))?;
        let others_can_connect = matches!(self.server.endpoint.0, Socket::Listening(_));
        let version_by = others_can_connect.then(|| Instant::now() + VERSION_TIMEOUT);
        self.current = Some(Current { connection, session, version_by });
        self.pending = true;
        Ok(())
    }

    /// Closes the connection: the function is reset, interrupts are turned off, memory is unmapped.
    fn disconnect(&mut self, why: &str) -> Result<(), Error> {
        let Some(Current { connection, session, .. }) = self.current.take() else { return Ok(()) };
        self.pending = false;
        let start = Instant::now();
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        let (peer, counters) = (session.peer().to_string(), session.counters());
        session.close();
        self.server.board.clear_front_end();
        (self.reacquire_at, self.reacquire_failures) = (Instant::now(), 0);
        let took = start.elapsed().as_millis();
        self.connection_log.info(|| {
            format!("front-end disconnected: {peer}: {why}; device reset, memory unmapped in {took} ms; {counters}")
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
