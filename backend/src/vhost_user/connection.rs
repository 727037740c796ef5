//! The connection to one front-end. The next message is peeked at, and read only once all of it has arrived, so a
//! front-end cannot block the control thread.
//!
//! The codec reads with blocking calls. It retries where it should give up (more than 32 descriptors), does not know
//! `SET_STATUS`, `GET_STATUS`, `SET_LOG_FD` and `GET_VRING_BASE_SKIP_DRAIN`, and would wait for an acknowledgement on the
//! back-end channel. So each message is examined first:
//!
//! ```text
//!            ┌─ incomplete ────────────▶ wait for more
//!  peek ─────┼─ malformed ─────────────▶ end of the connection
//!            ├─ one of these, or SET_BACKEND_REQ_FD ─▶ handled here
//!            └─ any other ─────────────▶ codec ─▶ Session
//! ```

mod descriptors;
mod handed_over;

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::error::MAX_MESSAGE;
use super::features::{Names, ProtocolFeatures};
use super::logs::Logs;
use super::session::Session;
use super::{Device, Error};
use crate::foreign_fd::{MAX_UNCLOSED, ReceivedFds, UnusableFds};
use crate::socket::Peer;

/// File descriptors per message; the codec's limit.
const MAX_DESCRIPTORS: usize = 32;

/// How long [`Connection::hangs_up_soon`] waits. An exiting process closes its sockets one after the other.
const HANG_UP_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Flags of a message (vhost-user: "Header").
const VERSION_1: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// Stops a vring and leaves what is in flight to its record. A message that came after the codec (vhost-user: "Front-end message
/// types").
const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;

/// The header of a message, in the byte order of the host (vhost-user: "Header").
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

const HEADER_SIZE: usize = size_of::<Header>();

impl Header {
    fn name(self) -> String {
        match FrontendReq::try_from(self.request) {
            Ok(request) => format!("{request:?}"),
            Err(()) if self.request == GET_VRING_BASE_SKIP_DRAIN => "GET_VRING_BASE_SKIP_DRAIN".to_owned(),
            Err(()) => self.request.to_string(),
        }
    }

    fn malformed(self, problem: impl Into<String>) -> Error {
        Error::Malformed { request: self.name(), problem: problem.into() }
    }
}

/// The result of [`Connection::serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// A message has been served; there may be more.
    Served,
    /// There is no complete message.
    Idle,
    /// The front-end has disconnected.
    Disconnected,
}

/// The result of [`Connection::peek`].
enum Peeked {
    Incomplete,
    Disconnected,
    Message(Header, HasDescriptors),
}

type HasDescriptors = bool;

/// One front-end's socket and session.
pub(super) struct Connection<'d> {
    socket: UnixStream,
    session: Arc<Mutex<Session<'d>>>,
    codec: BackendReqHandler<Mutex<Session<'d>>>,
}

impl<'d> Connection<'d> {
    pub(super) fn new(socket: UnixStream, device: &'d Device, logs: &'d Logs) -> io::Result<Self> {
        let peer = Peer::of(&socket)?;
        Self::of(socket, Session::new(device, logs, peer))
    }

    /// A front-end whose session has begun.
    pub(super) fn of(socket: UnixStream, session: Session<'d>) -> io::Result<Self> {
        // The codec requires a blocking socket. An inherited one may be non-blocking.
        socket.set_nonblocking(false)?;
        let session = Arc::new(Mutex::new(session));
        let codec = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        Ok(Self { socket, session, codec })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session<'d>> {
        self.session.lock().expect("the control thread has not panicked")
    }

    /// True once the front-end cannot send any more. Messages that it has sent may still be unread.
    pub(super) fn hung_up(&self) -> io::Result<bool> {
        Ok(self.poll()?.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR))
    }

    /// Waits up to [`HANG_UP_WAIT`] for the front-end to hang up; true if it does.
    pub(super) fn hangs_up_soon(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&HANG_UP_WAIT)) == Ok(1)
    }

    fn poll(&self) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN | PollFlags::OUT | PollFlags::RDHUP)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(_) | Err(Errno::INTR) => Ok(fds[0].revents()),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves at most one message, without waiting for the front-end.
    ///
    /// # Errors
    /// The connection must be closed.
    pub(super) fn serve(&mut self) -> Result<Progress, Error> {
        // Checked before peeking: after a hang-up, `peek` sees all that will ever arrive.
        let hung_up = self.hung_up().map_err(Error::system("poll"))?;
        let (header, has_descriptors) = match self.peek()? {
            Peeked::Disconnected => return Ok(Progress::Disconnected),
            Peeked::Incomplete if hung_up => return Ok(Progress::Disconnected),
            Peeked::Incomplete => return Ok(Progress::Idle),
            Peeked::Message(header, has_descriptors) => (header, has_descriptors),
        };
        log::debug!("{} flags {:#x} size {}", header.name(), header.flags, header.size);
        self.session().register_with_shim();
        let unusable = if has_descriptors { self.check_descriptors(header)? } else { None };
        if !hung_up && !self.poll().map_err(Error::system("poll"))?.contains(PollFlags::OUT) {
            return Err(Error::NotReading);
        }
        if let Some(unusable) = unusable {
            return self.refuse(header, unusable);
        }
        match FrontendReq::try_from(header.request) {
            Ok(FrontendReq::SET_STATUS) => self.set_status(header)?,
            Ok(FrontendReq::GET_STATUS) => self.get_status(header)?,
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => self.set_backend_channel(header)?,
            Ok(FrontendReq::SET_LOG_FD) => self.set_log_event(header)?,
            Err(()) if header.request == GET_VRING_BASE_SKIP_DRAIN => self.suspend_ring(header)?,
            // Belongs to ACCESS_PLATFORM. The codec does not know it.
            Ok(FrontendReq::IOTLB_MSG) => return Err(Error::NotImplemented("IOTLB_MSG")),
            _ => return self.decode(header),
        }
        Ok(Progress::Served)
    }

    /// Peeks at the next header. The message is complete if as many bytes have arrived as the header announces.
    fn peek(&self) -> Result<Peeked, Error> {
        let mut bytes = [0; HEADER_SIZE];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let seen = match recvmsg(&self.socket, &mut iov, &mut RecvAncillaryBuffer::default(), flags) {
            Ok(seen) if seen.bytes == 0 => return Ok(Peeked::Disconnected),
            Ok(seen) => seen,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Peeked::Incomplete),
            Err(Errno::CONNRESET) => return Ok(Peeked::Disconnected),
            Err(error) => return Err(Error::system("receive")(error)),
        };
        let available = ioctl_fionread(&self.socket).map_err(Error::system("FIONREAD"))?;
        if seen.bytes < HEADER_SIZE {
            // A peek ends after bytes that carry descriptors.
            let split = available >= HEADER_SIZE as u64 && seen.flags.contains(ReturnFlags::CTRUNC);
            let problem = "its header is cut in two by file descriptors";
            return if split {
                Err(Error::Malformed { request: "unknown".into(), problem: problem.into() })
            } else {
                Ok(Peeked::Incomplete)
            };
        }
        let header = Header::read_from_bytes(&bytes).expect("HEADER_SIZE bytes");
        if header.size > MAX_MESSAGE {
            return Err(Error::Oversized { request: header.name(), size: header.size });
        }
        if available < HEADER_SIZE as u64 + u64::from(header.size) {
            return Ok(Peeked::Incomplete);
        }
        self.check_pieces(header)?;
        Ok(Peeked::Message(header, seen.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Refuses a message that descriptors cut in two. A peek ends after bytes that carry descriptors. That the flag is set says
    /// nothing here: a peek that has read its last byte reports the descriptors of the next message, too.
    fn check_pieces(&self, header: Header) -> Result<(), Error> {
        let mut bytes = [0; HEADER_SIZE + MAX_MESSAGE as usize];
        let all = HEADER_SIZE + header.size as usize;
        let mut iov = [IoSliceMut::new(&mut bytes[..all])];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let seen = recvmsg(&self.socket, &mut iov, &mut RecvAncillaryBuffer::default(), flags);
        if seen.map_err(Error::system("receive"))?.bytes == all {
            return Ok(());
        }
        Err(header.malformed("it is cut in two by file descriptors"))
    }

    /// Looks at copies of the next message's descriptors, and perhaps of the one after it. Returns why they cannot be used, if
    /// they cannot.
    fn check_descriptors(&self, header: Header) -> Result<Option<UnusableFds>, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let seen = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)
            .map_err(Error::system("receive descriptors"))?;
        let received = ReceivedFds::take(&mut control, seen.flags.contains(ReturnFlags::CTRUNC));
        let problem = match &received {
            ReceivedFds { count, .. } if *count > MAX_DESCRIPTORS => "more than 32 file descriptors",
            ReceivedFds { unclosed, .. } if *unclosed > MAX_UNCLOSED => "more file descriptors that cannot be closed",
            _ => return Ok(received.unusable),
        };
        Err(Error::Descriptors { request: header.name(), problem })
    }

    /// Refuses the next message, whose descriptors cannot be used. It is received without them, and the kernel drops them.
    fn refuse(&mut self, header: Header, unusable: UnusableFds) -> Result<Progress, Error> {
        let mut left = HEADER_SIZE + header.size as usize;
        let mut bytes = vec![0; left];
        while left > 0 {
            let mut iov = [IoSliceMut::new(&mut bytes[..left])];
            let received = recvmsg(&self.socket, &mut iov, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT);
            left -= received.map_err(Error::system("receive"))?.bytes;
        }
        let error = Error::UnusableDescriptors { request: header.name(), unusable };
        let acks = self.session().protocol().contains(ProtocolFeatures::REPLY_ACK);
        if can_be_refused(header.request, header.flags & NEED_REPLY != 0 && acks) {
            self.acknowledge(header, Err(error))?;
            Ok(Progress::Served)
        } else {
            Err(error)
        }
    }

    /// Lets the codec read the message and call the session. Decides whether a failure ends the connection.
    fn decode(&mut self, header: Header) -> Result<Progress, Error> {
        use vhost::vhost_user::Error as Codec;
        let result = self.codec.handle_request();
        let mut session = self.session();
        let acknowledged = header.flags & NEED_REPLY != 0 && session.protocol().contains(ProtocolFeatures::REPLY_ACK);
        let ends = |refusal: &Error| {
            let relied_on = refusal.concerns_log() && !acknowledged;
            refusal.ends_connection() || relied_on || !can_be_refused(header.request, acknowledged)
        };
        match (result, session.take_refusal()) {
            (Ok(()), None) => Ok(Progress::Served),
            (_, Some(refusal)) if ends(&refusal) => Err(refusal),
            (_, Some(_)) => Ok(Progress::Served),
            (Err(Codec::Disconnected | Codec::PartialMessage | Codec::SocketBroken(_)), None) => {
                Ok(Progress::Disconnected)
            }
            (Err(error), None) => Err(header.malformed(error.to_string())),
        }
    }

    fn set_status(&mut self, header: Header) -> Result<(), Error> {
        self.require_feature(header, ProtocolFeatures::STATUS)?;
        let status = u64::from_ne_bytes(self.receive(header, &mut RecvAncillaryBuffer::default())?);
        let result = self.session().set_status(status);
        self.acknowledge(header, result)
    }

    fn suspend_ring(&mut self, header: Header) -> Result<(), Error> {
        self.require_feature(header, ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN)?;
        let [a, b, c, d, _num @ ..]: [u8; 8] = self.receive(header, &mut RecvAncillaryBuffer::default())?;
        let index = [a, b, c, d];
        let base = self.session().suspend_ring(u32::from_ne_bytes(index));
        // There is no reply to a refusal, for which the front-end would wait.
        let base = base.map_err(|error| self.session().count_refusal(error))?;
        let [e, f, g, h] = base.to_ne_bytes();
        self.reply(header, u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }

    /// Sends the result of a message if the front-end has requested it.
    fn acknowledge(&self, header: Header, result: Result<(), Error>) -> Result<(), Error> {
        let result = result.map_err(|error| self.session().count_refusal(error));
        let acks = self.session().protocol().contains(ProtocolFeatures::REPLY_ACK);
        if header.flags & NEED_REPLY != 0 && acks {
            self.reply(header, u64::from(result.is_err()))?;
        }
        match result {
            Err(error) if error.ends_connection() => Err(error),
            _ => Ok(()),
        }
    }

    fn get_status(&mut self, header: Header) -> Result<(), Error> {
        self.require_feature(header, ProtocolFeatures::STATUS)?;
        let [] = self.receive(header, &mut RecvAncillaryBuffer::default())?;
        let status = self.session().status();
        self.reply(header, status)
    }

    /// Fails if `feature`, to which the message belongs, has not been negotiated.
    fn require_feature(&self, header: Header, feature: ProtocolFeatures) -> Result<(), Error> {
        if self.session().protocol().contains(feature) {
            return Ok(());
        }
        Err(header.malformed(format!("protocol feature {} has not been negotiated", Names(feature))))
    }

    /// Receives the message whose header has been peeked at. Its payload has `N` bytes; its descriptors go to `control`.
    fn receive<const N: usize>(&self, header: Header, control: &mut RecvAncillaryBuffer<'_>) -> Result<[u8; N], Error> {
        if header.flags & !NEED_REPLY != VERSION_1 || header.size as usize != N {
            return Err(header.malformed(format!("flags {:#x} size {}", header.flags, header.size)));
        }
        let mut message = [0; HEADER_SIZE + 8];
        let message = &mut message[..HEADER_SIZE + N];
        let mut iov = [IoSliceMut::new(message)];
        // The kernel closes descriptors that do not fit into `control`.
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut iov, control, flags).map_err(Error::system("receive"))?;
        if received.bytes != HEADER_SIZE + N || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Error::Descriptors { request: header.name(), problem: "too many file descriptors" });
        }
        Ok(*message[HEADER_SIZE..].first_chunk().expect("N bytes"))
    }

    fn reply(&self, to: Header, value: u64) -> Result<(), Error> {
        let header = Header { request: to.request, flags: VERSION_1 | REPLY, size: 8 };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(&value.to_ne_bytes());
        match send(&self.socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // The front-end has disconnected, which the next `serve` reports.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(Error::system("send")(error)),
        }
    }
}

/// True if the connection can continue after this request was refused. It cannot if the front-end waits for a reply, which
/// the codec does not send after a failure, or if the front-end would take a refused change of memory for done, or its
/// requests in flight for recorded.
fn can_be_refused(request: u32, acknowledged: bool) -> bool {
    match FrontendReq::try_from(request) {
        Ok(
            FrontendReq::SET_MEM_TABLE
            | FrontendReq::ADD_MEM_REG
            | FrontendReq::REM_MEM_REG
            | FrontendReq::SET_INFLIGHT_FD,
        ) => acknowledged,
        Ok(
            FrontendReq::SET_FEATURES
            | FrontendReq::SET_PROTOCOL_FEATURES
            | FrontendReq::RESET_OWNER
            | FrontendReq::RESET_DEVICE
            | FrontendReq::SET_VRING_NUM
            | FrontendReq::SET_VRING_ADDR
            | FrontendReq::SET_VRING_BASE
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_VRING_ENABLE
            | FrontendReq::SET_CONFIG,
        ) => true,
        _ => false,
    }
}
