//! A front-end that waits while another one is served. Its memory is mapped in a second address space. When the one that is served
//! has stopped its vrings or has left, and the waiting one has a vring that is ready, it takes that one's place:
//!
//! ```text
//!  the one that is served          the one that waits
//!  rings run                       negotiates; memory is pinned and flushed, not reachable
//!  GET_VRING_BASE: drained         rings are set up, and do not run
//!                                  the function is moved to its memory (idle, in one step)
//!                                  rings run
//!                                  its first request completes
//!  memory unmapped, disconnected
//! ```
//!
//! Until the function has been moved, nothing has changed for the one that is served: it can start its vrings again, and the one
//! that waits can fail or leave.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{ControlLoop, FRONT_END, NEXT, Ready};
use crate::hardware::SecondSpace;
use crate::socket::Peer;
use crate::vhost_user::Error;
use crate::vhost_user::connection::{Connection, Progress};
use crate::vhost_user::session::Session;

/// The front-end that waits.
pub(in super::super) struct Next<'d> {
    // Before the space, from which its memory must be unmapped.
    connection: Connection<'d>,
    second: Arc<dyn SecondSpace>,
    /// Its socket may hold a whole message.
    pending: bool,
}

impl Next<'_> {
    pub(super) fn config_changed(&self) {
        self.connection.session().config_changed();
    }
}

/// A front-end that has given way. Its memory is unmapped only when the next one is at work, because that can take long.
pub(super) struct Former<'d> {
    connection: Connection<'d>,
    // After the connection, which unmaps its memory here.
    second: Arc<dyn SecondSpace>,
    since: Instant,
    /// Who has taken its place.
    by: String,
}

impl Former<'_> {
    /// How long the next one may take to complete a request. Its guest may have none.
    const PATIENCE: Duration = Duration::from_secs(1);
}

/// Waits for the first request of a front-end that has taken another one's place.
pub(super) struct Downtime {
    /// When the last vring of the former one had stopped.
    stopped_at: Instant,
    /// Requests completed by then.
    completed: u64,
}

impl Downtime {
    /// How often it is checked.
    pub(super) const INTERVAL: Duration = Duration::from_millis(1);
    /// How long it is waited for.
    const PATIENCE: Duration = Duration::from_secs(5);
}

impl ControlLoop<'_> {
    /// True if a front-end's socket may hold a message.
    pub(super) fn is_pending(&self) -> bool {
        self.pending || self.next.as_ref().is_some_and(|next| next.pending)
    }

    /// Lets a front-end wait, or sends it away.
    pub(super) fn let_wait(&mut self, socket: UnixStream) -> Result<(), Error> {
        let peer = Peer::of(&socket).map_err(Error::system("SO_PEERCRED"))?;
        let name = peer.to_string();
        self.end_former()?;
        let (second, kvm_socket) = match self.room_for(&peer) {
            Ok(found) => found,
            Err(reason) => {
                self.logs.rejections.warn(|| format!("sent {name} away, which was to wait for its turn: {reason}"));
                return Ok(());
            }
        };
        let session = Session::of_next((self.device, self.logs), peer, second.space(), kvm_socket);
        let connection = Connection::of(socket, session).map_err(Error::system("set up a connection"))?;
        self.poller.add_edge(connection.socket().as_fd(), NEXT).map_err(Error::system("epoll_ctl"))?;
        self.logs.connections.info(|| format!("front-end waits for its turn: {name}"));
        self.succession.was_used();
        self.board.post_next(Some(connection.session().peer()));
        self.next = Some(Next { connection, second, pending: true });
        Ok(())
    }

    /// A second address space for `peer`, and the socket of its VM's shim; or why it must not wait.
    fn room_for(&self, peer: &Peer) -> Result<(Arc<dyn SecondSpace>, Option<PathBuf>), String> {
        if let Some(next) = &self.next {
            return Err(format!("{} waits already", next.connection.session().peer()));
        }
        if let Some(served) = &self.connection {
            let served = served.session();
            if served.peer().uid() != peer.uid() {
                return Err(format!("it is of another user than {}, which is served", served.peer()));
            }
        }
        let kvm_socket = self.succession.kvm_socket();
        if self.device.vmm.registers() && kvm_socket.is_none() {
            return Err("the shim of its VM is not known; let it wait with ctl successor --kvm-socket PATH".into());
        }
        let second = self.device.space.second().map_err(|error| error.to_string())?;
        Ok((second, kvm_socket))
    }

    /// Serves one message of the front-end that waits, and lets it take its turn if it can.
    pub(super) fn serve_next(&mut self, ready: &Ready) -> Result<(), Error> {
        self.check_downtime();
        self.end_former_in_time()?;
        let Some(next) = &mut self.next else { return Ok(()) };
        if next.pending || ready.next {
            match next.connection.serve() {
                Ok(Progress::Served) => next.pending = true,
                Ok(Progress::Idle) => next.pending = false,
                Ok(Progress::Disconnected) => return self.send_next_away("it has left"),
                Err(error) => return self.send_next_away(&error.to_string()),
            }
        }
        let turn = match &self.connection {
            None => true,
            Some(served) => served.session().has_stopped() && next.connection.session().is_ready(),
        };
        if turn { self.take_turn() } else { Ok(()) }
    }

    /// The front-end that waits takes the place of the one that is served, or of the one that has left.
    fn take_turn(&mut self) -> Result<(), Error> {
        let Some(next) = self.next.take() else { return Ok(()) };
        let former = self.connection.take();
        let stopped_at = former.as_ref().and_then(|former| former.session().stopped_at());
        let start = Instant::now();
        let completed = self.completed();
        let succeeded = {
            let mut session = former.as_ref().map(Connection::session);
            next.connection.session().succeed(session.as_deref_mut(), &*next.second)
        };
        if let Err(error) = succeeded {
            self.connection = former;
            self.next = Some(next);
            return self.send_next_away(&error.to_string());
        }
        let (took, name) = (start.elapsed().as_micros(), next.connection.session().peer().to_string());
        let since = stopped_at.map(|at| format!("; no ring has run for {} us", at.elapsed().as_micros()));
        let since = since.unwrap_or_default();
        self.logs.connections.info(|| format!("{name} has its turn: moved to its memory in {took} us{since}"));
        self.downtime = stopped_at.map(|stopped_at| Downtime { stopped_at, completed });
        self.board.post_next(None);
        self.board.post_front_end(next.connection.session().peer());
        self.board.post_memory(next.connection.session().memory());
        self.poller.remove(next.connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        self.poller.add_edge(next.connection.socket().as_fd(), FRONT_END).map_err(Error::system("epoll_ctl"))?;
        if let Some(former) = former {
            self.poller.remove(former.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
            let (second, since, by) = (Arc::clone(&next.second), Instant::now(), name);
            self.former = Some(Former { connection: former, second, since, by });
        }
        let Next { connection, .. } = next;
        (self.connection, self.pending) = (Some(connection), true);
        if let Some(store) = self.store {
            store.begin();
        }
        Ok(())
    }

    /// Ends the connection of the front-end that waits. The one that is served notices nothing.
    pub(in super::super) fn send_next_away(&mut self, reason: &str) -> Result<(), Error> {
        let Some(Next { connection, second, .. }) = self.next.take() else { return Ok(()) };
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        self.board.post_next(None);
        let ended = end(connection, self.logs, &format!("{reason}; it has not had its turn"));
        drop(second);
        ended
    }

    /// Ends the connection of a front-end that has given way, unless the next one is still about to start.
    fn end_former_in_time(&mut self) -> Result<(), Error> {
        let Some(former) = &self.former else { return Ok(()) };
        let starts = self.pending || self.downtime.is_some() && former.since.elapsed() < Former::PATIENCE;
        if starts && self.connection.is_some() { Ok(()) } else { self.end_former() }
    }

    /// Unmaps the memory of a front-end that has given way, and closes its socket.
    pub(super) fn end_former(&mut self) -> Result<(), Error> {
        let Some(Former { connection, second, by, .. }) = self.former.take() else { return Ok(()) };
        let ended = end(connection, self.logs, &format!("{by} has taken its place"));
        drop(second);
        ended
    }

    fn completed(&self) -> u64 {
        let counted = self.device.engine.statistics();
        counted.reads + counted.writes + counted.flushes + counted.discards + counted.write_zeroes + counted.zones
    }

    /// Logs how long the guest had no disk, once it is known.
    fn check_downtime(&mut self) {
        let Some(Downtime { stopped_at, completed }) = &self.downtime else { return };
        let past = stopped_at.elapsed();
        if self.completed() != *completed {
            self.logs.connections.info(|| format!("downtime {} ms, to the first request completed", past.as_millis()));
        } else if past < Downtime::PATIENCE {
            return;
        }
        self.downtime = None;
    }
}

/// Unmaps the memory of a front-end that is not served, and closes its socket.
fn end(connection: Connection<'_>, logs: &crate::vhost_user::logs::Logs, reason: &str) -> Result<(), Error> {
    let mut session = connection.session();
    let closed = session.close();
    logs.connections.info(|| format!("front-end disconnected: {}: {reason}; memory unmapped", session.peer()));
    closed
}
