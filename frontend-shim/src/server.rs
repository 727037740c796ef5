//! The shim's own thread in the VMM: a poll loop over the listening socket and at most sixteen connections. It shares with
//! the VMM's threads nothing but [`Vm`], takes none of their locks and waits for nobody but KVM and a discard that has
//! begun; so a peer can at worst keep this thread busy, and not even that for long:
//! requests and connections beyond a generous rate end or wait.
//!
//! ```text
//!            accept                    HELLO                       REGISTER UNREGISTER QUERY
//!   (none) ──────────► Connected ──────────────────► Greeted ◄───────────────────────────────┐
//!             │            │ 5 s, anything else         │ └──────────────────────────────────┘
//!             │ too many,  ▼                            │ closed, malformed, flood, replies unread
//!             │ stranger  reply, closed ◄───────────────┘ its registrations go
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
use crate::registry::{Machine, PeerId, Registry};
use crate::sys;
use crate::vm::Vm;
use crate::wire::{Dma, Kind, Reason, Refusal, Reply, Request, Status};

/// Connections at a time.
const PEERS: usize = 16;
/// Pause after the process has run out of descriptors or memory, or when connections come too fast.
const BREATH: Duration = Duration::from_millis(100);

/// The shim's server.
pub struct Server<'a>(Service<'a, Vm>);

impl<'a> Server<'a> {
    /// Listens as `config` says, for the VM in `vm`.
    ///
    /// # Errors
    /// The errno of the step that failed; see the log for what was done.
    pub fn new(config: &Config, vm: &'a Vm) -> io::Result<Self> {
        let listener = listener::listen_at(&config.socket, config.peer)?;
        let server = Self(Service::new(listener, config, vm));
        let (path, policy) = (config.socket.display(), config.policy);
        (config.log)(format_args!("listening at {path}, policy {policy}, for uid {}", server.0.allowed[1].as_raw()));
        Ok(server)
    }

    /// Serves, for ever. Meant for a thread of its own in which all signals are blocked, so that the VMM's handlers do not
    /// run there.
    pub fn run(&mut self) -> ! {
        loop {
            self.0.turn(None);
        }
    }
}

struct Service<'a, M: Machine> {
    listener: OwnedFd,
    /// The users that may connect: the VMM's, and the one that its environment names.
    allowed: [Uid; 2],
    registry: Registry<'a, M>,
    peers: Vec<Peer>,
    peers_ever: u64,
    log: fn(fmt::Arguments<'_>),
    lines: Budget,
    arrivals: Budget,
}

impl<'a, M: Machine> Service<'a, M> {
    fn new(listener: OwnedFd, config: &Config, machine: &'a M) -> Self {
        let now = Instant::now();
        let own = rustix::process::geteuid();
        Self {
            listener,
            allowed: [own, config.peer.unwrap_or(own)],
            registry: Registry::new(machine, config.policy),
            peers: Vec::new(),
            peers_ever: 0,
            log: config.log,
            lines: Budget::new(50, Duration::from_secs(2), now),
            arrivals: Budget::new(64, BREATH, now),
        }
    }

    /// Says something, unless too much was said: a peer that comes back again and again must not fill the VMM's log.
    fn say(&mut self, line: fmt::Arguments<'_>) {
        if self.lines.take(Instant::now()) {
            (self.log)(line);
        }
    }

    /// Waits until something happens, but not longer than `patience`, and deals with it.
    fn turn(&mut self, patience: Option<Duration>) {
        let deadline = self.peers.iter().filter_map(Peer::deadline).min();
        let until_deadline = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let patience = [patience, until_deadline].into_iter().flatten().min();
        let timeout = patience.and_then(|time| Timespec::try_from(time).ok());

        let sources = self.peers.iter().map(Peer::as_fd).chain([self.listener.as_fd()]);
        let mut polled: Vec<_> = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => std::thread::sleep(BREATH),
        }
        let mut ready: Vec<bool> = polled.iter().map(|polled| !polled.revents().is_empty()).collect();
        let someone_waits = ready.pop() == Some(true);

        let now = Instant::now();
        for (mut peer, ready) in std::mem::take(&mut self.peers).into_iter().zip(ready) {
            let stays = match () {
                () if ready => self.hear(&mut peer, now),
                () => peer.deadline().is_none_or(|deadline| now < deadline),
            };
            if stays {
                self.peers.push(peer);
            } else {
                self.part(&peer);
            }
        }
        if someone_waits {
            self.accept(now);
        }
    }

    /// One message of a peer. False if the connection is to end.
    fn hear(&mut self, peer: &mut Peer, now: Instant) -> bool {
        let (request, file) = match peer.receive(now) {
            Received::Nothing => return true,
            Received::Gone => return false,
            Received::Wrong(reason) => return self.dismiss(peer, 0, reason),
            Received::Request(request, file) => (request, file),
        };
        if !peer.greeted && request.kind != Kind::Hello {
            return self.dismiss(peer, request.serial, Reason::HelloFirst);
        }
        peer.greeted = true;
        let outcome = self.do_it(peer, request, file);
        if outcome.is_err_and(|refusal| refusal.reason == Reason::Malformed) {
            return self.dismiss(peer, request.serial, Reason::Malformed);
        }
        peer.reply(&Reply { serial: request.serial, outcome, status: self.registry.status() })
    }

    fn do_it(&mut self, peer: &Peer, request: Request, file: Option<OwnedFd>) -> Result<u64, Refusal> {
        match (request.kind, file) {
            (Kind::Hello | Kind::Query, None) => Ok(0),
            (Kind::Unregister(handle), None) => self.registry.unregister(peer.id, handle).map(|()| handle),
            (Kind::Register(dma), file) => {
                let name = file.as_ref().map(|file| file::name(file.as_fd()));
                let outcome = self.registry.register(peer.id, dma, file);
                self.tell_of_registration(peer, dma, name.as_deref(), outcome);
                outcome
            }
            (_, Some(_)) => Err(Reason::Malformed.into()),
        }
    }

    fn tell_of_registration(
        &mut self,
        peer: &Peer,
        dma: Dma,
        name: Option<&std::path::Path>,
        outcome: Result<u64, Refusal>,
    ) {
        let (pid, status) = (peer.pid, self.registry.status());
        let what = name.map_or("its device".into(), |name| name.display().to_string());
        match (outcome, dma) {
            (Ok(_), Dma::NonCoherent) => self.say(format_args!(
                "process {pid} registered {what}: KVM is told of non-coherent DMA, guest memory is not discarded"
            )),
            (Ok(_), Dma::Coherent) => {
                self.say(format_args!("process {pid} registered {what}: guest memory is not discarded"));
            }
            (Err(refusal), _) => {
                self.say(format_args!("process {pid} is refused {what}: {}", Refused { refusal, status }));
            }
        }
    }

    /// One last reply. False, as the connection is to end.
    fn dismiss(&mut self, peer: &Peer, serial: u32, reason: Reason) -> bool {
        let (refusal, status) = (Refusal::from(reason), self.registry.status());
        peer.reply(&Reply { serial, outcome: Err(refusal), status });
        self.say(format_args!("the connection to process {} is closed: {}", peer.pid, Refused { refusal, status }));
        false
    }

    fn part(&mut self, peer: &Peer) {
        let registrations = self.registry.leave(peer.id);
        if registrations > 0 {
            let Status { registered, .. } = self.registry.status();
            let pid = peer.pid;
            self.say(format_args!(
                "process {pid} has gone, and its registrations ({registrations}); {registered} left"
            ));
        }
    }

    fn accept(&mut self, now: Instant) {
        if !self.arrivals.take(now) {
            // A storm of connections slows its makers down, and costs the VM's processors nothing.
            std::thread::sleep(BREATH);
        }
        let socket = match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            // Still waiting at the next turn, which must not come at once.
            Err(_) => return std::thread::sleep(BREATH),
        };
        let Ok((pid, uid)) = sys::peer(&socket) else { return };
        self.peers_ever += 1;
        let peer = Peer::new(PeerId(self.peers_ever), pid, socket, now);
        if !self.allowed.contains(&Uid::from_raw(uid)) {
            self.dismiss(&peer, 0, Reason::Stranger);
        } else if self.peers.len() >= PEERS {
            self.dismiss(&peer, 0, Reason::TooMany);
        } else {
            self.peers.push(peer);
        }
    }
}

#[cfg(test)]
mod tests;
