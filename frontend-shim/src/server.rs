//! The shim's own thread in the VMM: a poll loop over the listening socket and at most sixteen connections. It shares only
//! [`Vm`] with the VMM's threads, takes none of their locks, and waits only for KVM and for a discard in progress. So a peer
//! can at worst keep this thread busy. Rate limits bound that as well: too many requests end the connection, and too many
//! connections are delayed.
//!
//! ```text
//!            accept                    HELLO                       REGISTER UNREGISTER QUERY
//!   (none) ──────────► Connected ──────────────────► Greeted ◄───────────────────────────────┐
//!             │            │ 5 s, anything else         │ └──────────────────────────────────┘
//!             │ too many,  ▼                            │ closed, malformed, too many requests, replies unread
//!             │ wrong user reply, closed ◄──────────────┘ its registrations end
//!             └──────────► reply, closed
//! ```

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::budget::Budget;
use crate::config::Config;
use crate::explain::Refused;
use crate::file;
use crate::listener;
use crate::peer::{Peer, Received};
use crate::registry::{PeerId, Registry, VmOps};
use crate::sys;
use crate::vm::Vm;
use crate::wire::{Dma, Kind, Reason, Refusal, Reply, Request, Status};

/// Most connections at a time.
const MAX_PEERS: usize = 16;
/// Delay when the process has run out of descriptors or memory, or when connections arrive too fast.
const BACKOFF: Duration = Duration::from_millis(100);

/// The shim's server.
pub struct Server<'a>(Service<'a, Vm>);

impl<'a> Server<'a> {
    /// Creates the listening socket of `config`, for the VM in `vm`.
    ///
    /// # Errors
    /// The errno of the step that failed.
    pub fn new(config: &Config, vm: &'a Vm) -> io::Result<Self> {
        let listener = listener::listen_at(&config.socket, config.peer)?;
        let server = Self(Service::new(listener, config, vm));
        let (path, policy) = (config.socket.display(), config.policy);
        (config.log)(format_args!("listening at {path}, policy {policy}, for uid {}", server.0.allowed[1].as_raw()));
        Ok(server)
    }

    /// Serves for ever. Run it in a thread of its own with all signals blocked, so that the VMM's signal handlers do not run
    /// there.
    pub fn run(&mut self) -> ! {
        loop {
            self.0.poll_once(None);
        }
    }
}

struct Service<'a, M: VmOps> {
    listener: OwnedFd,
    /// The users that may connect: the VMM's own and the configured one.
    allowed: [Uid; 2],
    registry: Registry<'a, M>,
    peers: Vec<Peer>,
    last_peer_id: u64,
    log: fn(fmt::Arguments<'_>),
    log_budget: Budget,
    connect_budget: Budget,
}

impl<'a, M: VmOps> Service<'a, M> {
    fn new(listener: OwnedFd, config: &Config, vm: &'a M) -> Self {
        let now = Instant::now();
        let own = rustix::process::geteuid();
        Self {
            listener,
            allowed: [own, config.peer.unwrap_or(own)],
            registry: Registry::new(vm, config.policy),
            peers: Vec::new(),
            last_peer_id: 0,
            log: config.log,
            log_budget: Budget::new(50, Duration::from_secs(2), now),
            connect_budget: Budget::new(64, BACKOFF, now),
        }
    }

    /// Logs a line. Rate-limited, so that a peer that reconnects in a loop cannot fill the VMM's log.
    fn log_line(&mut self, line: fmt::Arguments<'_>) {
        if self.log_budget.take(Instant::now()) {
            (self.log)(line);
        }
    }

    /// Waits for events, at most for `timeout`, and handles them.
    fn poll_once(&mut self, timeout: Option<Duration>) {
        let deadline = self.peers.iter().filter_map(Peer::deadline).min();
        let until_deadline = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = [timeout, until_deadline].into_iter().flatten().min();
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());

        let sources = self.peers.iter().map(Peer::as_fd).chain([self.listener.as_fd()]);
        let mut polled: Vec<_> = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => std::thread::sleep(BACKOFF),
        }
        let mut ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        let connection_waiting = ready.pop() == Some(true);

        let now = Instant::now();
        for (mut peer, ready) in std::mem::take(&mut self.peers).into_iter().zip(ready) {
            let keep = match () {
                () if ready => self.handle_message(&mut peer, now),
                () => peer.deadline().is_none_or(|deadline| now < deadline),
            };
            if keep {
                self.peers.push(peer);
            } else {
                self.disconnect(&peer);
            }
        }
        if connection_waiting {
            self.accept(now);
        }
    }

    /// Handles one message of a peer. False if the connection must end.
    fn handle_message(&mut self, peer: &mut Peer, now: Instant) -> bool {
        let (request, file) = match peer.receive(now) {
            Received::Nothing => return true,
            Received::Closed => return false,
            Received::Invalid(reason) => return self.reject(peer, 0, reason),
            Received::Request(request, file) => (request, file),
        };
        if !peer.greeted && request.kind != Kind::Hello {
            return self.reject(peer, request.serial, Reason::HelloFirst);
        }
        peer.greeted = true;
        let outcome = self.execute(peer, request, file);
        if outcome.is_err_and(|refusal| refusal.reason == Reason::Malformed) {
            return self.reject(peer, request.serial, Reason::Malformed);
        }
        peer.reply(&Reply { serial: request.serial, outcome, status: self.registry.status() })
    }

    fn execute(&mut self, peer: &Peer, request: Request, file: Option<OwnedFd>) -> Result<u64, Refusal> {
        match (request.kind, file) {
            (Kind::Hello | Kind::Query, None) => Ok(0),
            (Kind::Unregister(handle), None) => self.registry.unregister(peer.id, handle).map(|()| handle),
            (Kind::Register(dma), file) => {
                let name = file.as_ref().map(|file| file::name(file.as_fd()));
                let outcome = self.registry.register(peer.id, dma, file);
                self.log_registration(peer, dma, name.as_deref(), outcome);
                outcome
            }
            (_, Some(_)) => Err(Reason::Malformed.into()),
        }
    }

    fn log_registration(
        &mut self,
        peer: &Peer,
        dma: Dma,
        name: Option<&std::path::Path>,
        outcome: Result<u64, Refusal>,
    ) {
        let (pid, status) = (peer.pid, self.registry.status());
        let device = name.map_or("its device".into(), |name| name.display().to_string());
        match (outcome, dma) {
            (Ok(_), Dma::NonCoherent) => self.log_line(format_args!(
                "process {pid} registered {device}: KVM knows of non-coherent DMA, guest memory is not discarded"
            )),
            (Ok(_), Dma::Coherent) => {
                self.log_line(format_args!("process {pid} registered {device}: guest memory is not discarded"));
            }
            (Err(refusal), _) => {
                self.log_line(format_args!("refused {device} of process {pid}: {}", Refused { refusal, status }));
            }
        }
    }

    /// Sends a last reply. Returns false, because the connection must end.
    fn reject(&mut self, peer: &Peer, serial: u32, reason: Reason) -> bool {
        let (refusal, status) = (Refusal::from(reason), self.registry.status());
        peer.reply(&Reply { serial, outcome: Err(refusal), status });
        self.log_line(format_args!("closed the connection to process {}: {}", peer.pid, Refused { refusal, status }));
        false
    }

    fn disconnect(&mut self, peer: &Peer) {
        let registrations = self.registry.remove_peer(peer.id);
        if registrations > 0 {
            let Status { registered, .. } = self.registry.status();
            let pid = peer.pid;
            self.log_line(format_args!(
                "process {pid} has disconnected; removed its {registrations} registration(s), {registered} left"
            ));
        }
    }

    fn accept(&mut self, now: Instant) {
        if !self.connect_budget.take(now) {
            // Delays the clients that connect too fast, and leaves the processors to the VM.
            std::thread::sleep(BACKOFF);
        }
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            // The connection is still pending, so the next poll would return at once.
            Err(_) => return std::thread::sleep(BACKOFF),
        };
        let Ok((pid, uid)) = sys::peer(&socket) else { return };
        self.last_peer_id += 1;
        let peer = Peer::new(PeerId(self.last_peer_id), pid, socket, now);
        if !self.allowed.contains(&Uid::from_raw(uid)) {
            self.reject(&peer, 0, Reason::WrongUser);
        } else if self.peers.len() >= MAX_PEERS {
            self.reject(&peer, 0, Reason::LimitReached);
        } else {
            self.peers.push(peer);
        }
    }
}

#[cfg(test)]
mod tests;
