//! The bytes of one conversation: looks at the next message without taking it, and hands it on only when all of it is
//! there, so that nothing a front-end sends, or stops sending, can block the control thread.
//!
//! The codec reads with blocking calls, retries where it should give up (more than 32 descriptors), and does not know
//! `SET_STATUS` and `GET_STATUS`; and it would wait for an acknowledgement on the back-end's own channel. So each message is peeked at first:
//!
//! ```text
//!            ┌─ not complete ──────────▶ come back when more has arrived
//!  peek ─────┼─ no message, or hostile ▶ end of the conversation
//!            ├─ SET_STATUS GET_STATUS SET_BACKEND_REQ_FD ─▶ answered here
//!            └─ anything else ─────────▶ codec ─▶ Session
//! ```

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::error::MAX_MESSAGE;
use super::features::{Names, ProtocolFeatures};
use super::session::Session;
use super::{Device, Error};
use crate::socket::Peer;

/// Descriptors per message; the codec's own limit.
const MAX_DESCRIPTORS: usize = 32;

/// Flags of a message (vhost-user: "Header").
const VERSION_1: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// What starts every message, in the byte order of the machine.
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
        FrontendReq::try_from(self.request).map_or_else(|()| self.request.to_string(), |request| format!("{request:?}"))
    }

    fn malformed(self, what: impl Into<String>) -> Error {
        Error::Malformed { request: self.name(), what: what.into() }
    }
}

/// What has become of the conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// A message has been served; there may be more.
    Served,
    /// Nothing (complete) to read.
    Idle,
    /// The front-end has gone.
    Gone,
}

/// What peeking found.
enum Peeked {
    Incomplete,
    Gone,
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
    pub(super) fn new(socket: UnixStream, device: &'d Device) -> io::Result<Self> {
        // The codec wants a socket that blocks; an inherited one may be either.
        socket.set_nonblocking(false)?;
        let session = Arc::new(Mutex::new(Session::new(device, Peer::of(&socket)?)));
        let codec = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&session));
        Ok(Self { socket, session, codec })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session<'d>> {
        self.session.lock().expect("one thread, and it has not panicked")
    }

    /// True once the front-end cannot send any more; what it has sent may still wait to be read.
    pub(super) fn hung_up(&self) -> io::Result<bool> {
        Ok(self.poll()?.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR))
    }

    /// Waits for the front-end to hang up, but not long: a process that ends closes its sockets one by one.
    pub(super) fn hangs_up_soon(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 })) == Ok(1)
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
    /// Why the conversation cannot go on.
    pub(super) fn serve(&mut self) -> Result<Progress, Error> {
        // Asked before peeking: then a hang-up means that all there will ever be can be seen.
        let hung_up = self.hung_up().map_err(Error::system("poll"))?;
        let (header, has_descriptors) = match self.peek()? {
            Peeked::Gone => return Ok(Progress::Gone),
            Peeked::Incomplete if hung_up => return Ok(Progress::Gone),
            Peeked::Incomplete => return Ok(Progress::Idle),
            Peeked::Message(header, has_descriptors) => (header, has_descriptors),
        };
        log::debug!("{} flags {:#x} size {}", header.name(), header.flags, header.size);
        self.session().register_with_shim();
        if has_descriptors {
            self.check_descriptors(header)?;
        }
        if !hung_up && !self.poll().map_err(Error::system("poll"))?.contains(PollFlags::OUT) {
            return Err(Error::NotReading);
        }
        match FrontendReq::try_from(header.request) {
            Ok(FrontendReq::SET_STATUS) => self.set_status(header)?,
            Ok(FrontendReq::GET_STATUS) => self.get_status(header)?,
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => self.set_backend_channel(header)?,
            // The codec knows it as no message at all; it belongs to ACCESS_PLATFORM.
            Ok(FrontendReq::IOTLB_MSG) => return Err(Error::NotImplemented("IOTLB_MSG")),
            _ => return self.decode(header),
        }
        Ok(Progress::Served)
    }

    /// Looks at the next header; the message is there if its last byte is.
    fn peek(&self) -> Result<Peeked, Error> {
        let mut bytes = [0; HEADER_SIZE];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let seen = match recvmsg(&self.socket, &mut iov, &mut RecvAncillaryBuffer::default(), flags) {
            Ok(seen) if seen.bytes == 0 => return Ok(Peeked::Gone),
            Ok(seen) => seen,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Peeked::Incomplete),
            Err(Errno::CONNRESET) => return Ok(Peeked::Gone),
            Err(error) => return Err(Error::system("receive")(error)),
        };
        let there = ioctl_fionread(&self.socket).map_err(Error::system("FIONREAD"))?;
        if seen.bytes < HEADER_SIZE {
            // Peeking stops behind the bytes that descriptors came with.
            let split = there >= HEADER_SIZE as u64 && seen.flags.contains(ReturnFlags::CTRUNC);
            let what = "its header is cut in two by file descriptors";
            return if split {
                Err(Error::Malformed { request: "unknown".into(), what: what.into() })
            } else {
                Ok(Peeked::Incomplete)
            };
        }
        let header = Header::read_from_bytes(&bytes).expect("as many bytes as a header has");
        if header.size > MAX_MESSAGE {
            return Err(Error::Oversized { request: header.name(), size: header.size });
        }
        if there < HEADER_SIZE as u64 + u64::from(header.size) {
            return Ok(Peeked::Incomplete);
        }
        Ok(Peeked::Message(header, seen.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Counts the descriptors of the next message by peeking at copies of them.
    fn check_descriptors(&self, header: Header) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let seen = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)
            .map_err(Error::system("receive descriptors"))?;
        let rights = |message| if let RecvAncillaryMessage::ScmRights(fds) = message { fds.count() } else { 0 };
        let count: usize = control.drain().map(rights).sum();
        if count > MAX_DESCRIPTORS || seen.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Error::Descriptors { request: header.name(), what: "more than 32 file descriptors" });
        }
        Ok(())
    }

    /// Lets the codec read the message and call the session, and decides what a failure means.
    fn decode(&mut self, header: Header) -> Result<Progress, Error> {
        use vhost::vhost_user::Error as Codec;
        let result = self.codec.handle_request();
        let mut session = self.session();
        let acknowledged = header.flags & NEED_REPLY != 0 && session.protocol().contains(ProtocolFeatures::REPLY_ACK);
        match (result, session.take_refusal()) {
            (Ok(()), None) => Ok(Progress::Served),
            (_, Some(refusal)) if refusal.ends_conversation() || !can_be_refused(header.request, acknowledged) => {
                Err(refusal)
            }
            (_, Some(_)) => Ok(Progress::Served),
            (Err(Codec::Disconnected | Codec::PartialMessage | Codec::SocketBroken(_)), None) => Ok(Progress::Gone),
            (Err(error), None) => Err(header.malformed(error.to_string())),
        }
    }

    fn set_status(&mut self, header: Header) -> Result<(), Error> {
        self.expect(header, ProtocolFeatures::STATUS)?;
        let status = u64::from_ne_bytes(self.take(header, &mut RecvAncillaryBuffer::default())?);
        let done = self.session().set_status(status);
        self.acknowledge(header, done)
    }

    fn set_backend_channel(&mut self, header: Header) -> Result<(), Error> {
        self.expect(header, ProtocolFeatures::BACKEND_REQ)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let [] = self.take(header, &mut control)?;
        // There may be room for two: control messages are padded.
        let mut sockets: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                sockets.extend(fds);
            }
        }
        let what = "not one file descriptor";
        let (Some(socket), true) = (sockets.pop(), sockets.is_empty()) else {
            return Err(Error::Descriptors { request: header.name(), what });
        };
        let done = self.session().set_channel(socket);
        self.acknowledge(header, done)
    }

    /// Tells the front-end how it went, if it wants to know.
    fn acknowledge(&self, header: Header, done: Result<(), Error>) -> Result<(), Error> {
        let done = done.map_err(|error| self.session().refused(error));
        let acks = self.session().protocol().contains(ProtocolFeatures::REPLY_ACK);
        if header.flags & NEED_REPLY != 0 && acks {
            self.reply(header, u64::from(done.is_err()))?;
        }
        match done {
            Err(error) if error.ends_conversation() => Err(error),
            _ => Ok(()),
        }
    }

    fn get_status(&mut self, header: Header) -> Result<(), Error> {
        self.expect(header, ProtocolFeatures::STATUS)?;
        let [] = self.take(header, &mut RecvAncillaryBuffer::default())?;
        let status = self.session().status();
        self.reply(header, status)
    }

    /// Refuses a message that belongs to a feature which was not agreed on.
    fn expect(&self, header: Header, feature: ProtocolFeatures) -> Result<(), Error> {
        if self.session().protocol().contains(feature) {
            return Ok(());
        }
        Err(header.malformed(format!("protocol feature {} has not been negotiated", Names(feature))))
    }

    /// Takes the message whose header has been seen; its payload has `N` bytes, and descriptors go to `control`.
    fn take<const N: usize>(&self, header: Header, control: &mut RecvAncillaryBuffer<'_>) -> Result<[u8; N], Error> {
        if header.flags & !NEED_REPLY != VERSION_1 || header.size as usize != N {
            return Err(header.malformed(format!("flags {:#x} size {}", header.flags, header.size)));
        }
        let mut message = [0; HEADER_SIZE + 8];
        let message = &mut message[..HEADER_SIZE + N];
        let mut iov = [IoSliceMut::new(message)];
        // Descriptors that there is no room for are closed by the kernel.
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let taken = recvmsg(&self.socket, &mut iov, control, flags).map_err(Error::system("receive"))?;
        if taken.bytes != HEADER_SIZE + N || taken.flags.contains(ReturnFlags::CTRUNC) {
            return Err(Error::Descriptors { request: header.name(), what: "more file descriptors than belong there" });
        }
        Ok(*message[HEADER_SIZE..].first_chunk().expect("N bytes"))
    }

    fn reply(&self, to: Header, value: u64) -> Result<(), Error> {
        let header = Header { request: to.request, flags: VERSION_1 | REPLY, size: 8 };
        let mut message = header.as_bytes().to_vec();
        message.extend_from_slice(&value.to_ne_bytes());
        match send(&self.socket, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            // The peer has gone; the next look at the socket says so.
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(Error::system("send")(error)),
        }
    }
}

/// True if the conversation can go on after this request was refused. Not if the front-end waits for an answer that the
/// codec does not send for a failure, and not if it must believe now that memory is shared which is not.
fn can_be_refused(request: u32, acknowledged: bool) -> bool {
    match FrontendReq::try_from(request) {
        Ok(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG) => acknowledged,
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
