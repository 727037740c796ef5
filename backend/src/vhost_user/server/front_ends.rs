//! Front-ends come and go.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{ControlLoop, FRONT_END};
use crate::socket::{Listener, Peer};
use crate::vhost_user::Error;
use crate::vhost_user::connection::Connection;

/// Pause after a failed `accept`. The listening socket stays readable, and the lack of descriptors or memory may persist.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl ControlLoop<'_> {
    /// Accepts the next front-end, and rejects it if another one is connected.
    pub(super) fn accept(&mut self, listener: &Listener) -> Result<(), Error> {
        let socket = match listener.accept() {
            Ok(Some(socket)) => socket,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.logs.rejections.error(|| format!("accept: {error}"));
                std::thread::sleep(ACCEPT_PAUSE);
                return Ok(());
            }
        };
        let Some(connection) = &self.connection else { return self.adopt(socket) };
        if self.succession.is_allowed() {
            return self.let_wait(socket);
        }
        self.logs.rejections.warn(|| {
            let peer = Peer::of(&socket).map_or_else(|error| error.to_string(), |peer| peer.to_string());
            format!("sent {peer} away: this device is being used by {}", connection.session().peer())
        });
        Ok(())
    }

    pub(super) fn adopt(&mut self, socket: UnixStream) -> Result<(), Error> {
        let connection =
            Connection::new(socket, self.device, self.logs).map_err(Error::system("set up a connection"))?;
        self.logs.connections.info(|| format!("front-end connected: {}", connection.session().peer()));
        self.board.post_front_end(connection.session().peer());
        self.poller.add_edge(connection.socket().as_fd(), FRONT_END).map_err(Error::system("epoll_ctl"))?;
        self.connection = Some(connection);
        self.pending = true;
        Ok(())
    }

    /// Drains the vrings, unmaps guest memory and closes the socket.
    pub(in super::super) fn disconnect(&mut self, reason: &str) -> Result<(), Error> {
        let Some(connection) = self.connection.take() else { return Ok(()) };
        self.pending = false;
        let start = Instant::now();
        self.poller.remove(connection.socket().as_fd()).map_err(Error::system("epoll_ctl"))?;
        let mut session = connection.session();
        let closed = session.close();
        let took = start.elapsed().as_millis();
        self.logs.connections.info(|| {
            let peer = session.peer();
            format!("front-end disconnected: {peer}: {reason}; rings stopped, memory unmapped in {took} ms")
        });
        self.board.clear_front_end();
        if let Some(store) = self.store {
            store.clear();
        }
        closed
    }
}
