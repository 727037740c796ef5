//! A connection that another process has handed over. The codec keeps what was negotiated to itself, so the negotiation is sent to
//! it once more, over a socket of its own; then its socket is replaced by the front-end's.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, SocketType, sockopt};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;
use zerocopy::IntoBytes;

use super::{Connection, Header, VERSION_1};
use crate::handover::{FrontEnd, Incoming, Outgoing};
use crate::socket::Peer;
use crate::sys::redirect;
use crate::vhost_user::logs::Logs;
use crate::vhost_user::session::Session;
use crate::vhost_user::{Device, Error};

impl<'d> Connection<'d> {
    /// Describes the connection. No message has been read and not answered, and no vring runs.
    pub(in super::super) fn describe(&self, outgoing: &mut Outgoing) -> io::Result<FrontEnd> {
        self.session().describe(&self.socket, outgoing)
    }

    /// Restores a connection, and of its session what was negotiated.
    ///
    /// # Errors
    /// The description cannot be followed.
    pub(in super::super) fn inherit(
        state: &FrontEnd,
        descriptors: &mut Incoming,
        device: &'d Device,
        logs: &'d Logs,
    ) -> Result<Self, Error> {
        let socket = descriptors.take(state.connection)?;
        let is_stream = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !is_stream {
            let problem = "its file descriptor is not a UNIX stream socket";
            return Err(Error::Descriptors { request: "the front-end's connection".into(), problem });
        }
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false).map_err(Error::system("set up a connection"))?;
        let peer = Peer::of(&socket).map_err(Error::system("set up a connection"))?;
        let session = Arc::new(Mutex::new(Session::new(device, logs, peer)));
        let (ours, theirs) = UnixStream::pair().map_err(Error::system("socketpair"))?;
        let codec = BackendReqHandler::from_stream(theirs, Arc::clone(&session));
        let mut connection = Self { socket, session, codec };
        connection.replay(&ours, state)?;
        redirect(&mut connection.codec, &connection.socket).map_err(Error::system("dup3"))?;
        Ok(connection)
    }

    /// Sends the negotiation to the codec again, and through it to the session, which checks it.
    fn replay(&mut self, mut to: &UnixStream, state: &FrontEnd) -> Result<(), Error> {
        let get = state.asked_features.then_some((FrontendReq::GET_FEATURES, None));
        let protocol = Some((FrontendReq::SET_PROTOCOL_FEATURES, Some(state.protocol_features)));
        let features = state.acked_features.map(|acked| (FrontendReq::SET_FEATURES, Some(acked)));
        for (request, value) in [get, protocol, features].into_iter().flatten() {
            let payload = value.map(u64::to_ne_bytes);
            let header =
                Header { request: request as u32, flags: VERSION_1, size: if value.is_some() { 8 } else { 0 } };
            let message = [header.as_bytes(), payload.as_ref().map_or(&[], |bytes| &bytes[..])].concat();
            to.write_all(&message).map_err(Error::system("send"))?;
            let result = self.codec.handle_request();
            let refusal = self.session().take_refusal();
            match (result, refusal) {
                (_, Some(refusal)) => return Err(refusal),
                (Err(error), None) => return Err(header.malformed(error.to_string())),
                (Ok(()), None) => {}
            }
        }
        Ok(())
    }
}
