//! The socket of one front-end: receives whole messages and sends replies, and never blocks.
//!
//! Header and payload are read separately, and never beyond the end of the message. So descriptors are never attributed to
//! the wrong message: a read of the kernel ends before data with another set of descriptors (unix(7), SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use super::error::Error;
use super::version::{MAX_FDS, MAX_TEXT, MAX_TRANSFER};
use super::wire::{ERROR, HEADER, Header, RegionAccess, TYPE_COMMAND, TYPE_MASK, TYPE_REPLY};
use crate::foreign_fd::{MAX_UNCLOSED, ReceivedFds, UnusableFds};

/// Time-out for the rest of a message, and for a reply to be read.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Length of the longest message, a region write, in bytes.
const MAX_MESSAGE: usize = HEADER + size_of::<RegionAccess>() + MAX_TRANSFER;
const _: () = assert!(MAX_TEXT < MAX_TRANSFER);

/// A whole message.
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// Why some of its descriptors are not in `fds`.
    pub(super) unusable: Option<UnusableFds>,
}

/// A reply without its header.
#[derive(Default)]
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The result of [`Connection::receive`].
pub(super) enum Received {
    Message(Message),
    /// No message, or only a part of it yet.
    Incomplete,
    /// The front-end has closed the connection.
    Gone,
}

/// The part of the next message that has been received.
#[derive(Default)]
struct Incoming {
    header: Option<Header>,
    /// Of the header while `header` is `None`, then of the payload.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    unusable: Option<UnusableFds>,
    since: Option<Instant>,
}

impl Incoming {
    fn take_fds(&mut self, received: ReceivedFds) -> Result<(), Error> {
        if self.fds.len() + received.count > MAX_FDS {
            return Err(Error::Framing(format!("a message with more than {MAX_FDS} descriptors")));
        }
        self.fds.extend(received.fds);
        self.unusable = self.unusable.take().or(received.unusable);
        if received.unclosed > MAX_UNCLOSED {
            return Err(Error::Framing(format!("{MAX_UNCLOSED} descriptors of files that cannot be closed")));
        }
        Ok(())
    }
}

/// A reply that has not been sent completely.
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
    since: Instant,
}

/// One front-end's socket.
pub(super) struct Connection {
    socket: UnixStream,
    incoming: Incoming,
    outgoing: Option<Outgoing>,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, incoming: Incoming::default(), outgoing: None })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// When the front-end must have sent the rest of its message, or read the reply; `None` if neither is pending.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let since = self.outgoing.as_ref().map_or(self.incoming.since, |outgoing| Some(outgoing.since));
        since.map(|since| since + STALL_TIMEOUT)
    }

    /// # Errors
    /// [`Error::Stalled`] if the deadline has passed.
    pub(super) fn check_deadline(&self, now: Instant) -> Result<(), Error> {
        match self.deadline() {
            Some(deadline) if deadline <= now && self.outgoing.is_some() => {
                Err(Error::Stalled("a reply has not been read"))
            }
            Some(deadline) if deadline <= now => Err(Error::Stalled("a message has been incomplete")),
            _ => Ok(()),
        }
    }

    /// Receives the next message. While a reply is not completely sent, no message is received.
    ///
    /// # Errors
    /// Why the connection must be closed.
    pub(super) fn receive(&mut self) -> Result<Received, Error> {
        if !self.flush()? {
            return Ok(Received::Incomplete);
        }
        loop {
            let wanted = self.incoming.header.map_or(HEADER, |header| header.size as usize - HEADER);
            match self.fill(wanted)? {
                Fill::Full => {}
                Fill::Part => return Ok(Received::Incomplete),
                Fill::End => return Ok(Received::Gone),
            }
            match self.incoming.header {
                None => self.take_header()?,
                Some(header) => {
                    let Incoming { bytes, fds, unusable, .. } = std::mem::take(&mut self.incoming);
                    return Ok(Received::Message(Message { header, payload: bytes, fds, unusable }));
                }
            }
        }
    }

    /// Reads until `incoming` has `wanted` bytes.
    fn fill(&mut self, wanted: usize) -> Result<Fill, Error> {
        let Self { socket, incoming, .. } = self;
        let mut have = incoming.bytes.len();
        incoming.bytes.resize(wanted, 0);
        while have < wanted {
            match read(socket, &mut incoming.bytes[have..]) {
                Ok((0, _)) => return Ok(Fill::End),
                Ok((count, received)) => {
                    have += count;
                    incoming.since.get_or_insert_with(Instant::now);
                    incoming.take_fds(received)?;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    incoming.bytes.truncate(have);
                    return Ok(Fill::Part);
                }
                Err(Errno::CONNRESET) => return Ok(Fill::End),
                Err(errno) => return Err(Error::system("recvmsg")(errno)),
            }
        }
        Ok(Fill::Full)
    }

    fn take_header(&mut self) -> Result<(), Error> {
        let bytes = std::mem::take(&mut self.incoming.bytes);
        let header = Header::read_from_bytes(&bytes).expect("`fill` has read a whole header");
        let size = header.size as usize;
        if !(HEADER..=MAX_MESSAGE).contains(&size) {
            return Err(Error::Framing(format!("a message of {size} bytes; must be {HEADER} to {MAX_MESSAGE}")));
        }
        if header.flags & TYPE_MASK != TYPE_COMMAND {
            return Err(Error::Framing(format!("a message that is not a command (flags {:#x})", header.flags)));
        }
        self.incoming.header = Some(header);
        Ok(())
    }

    /// Sends the reply, or an errno, to the command with this `header`.
    ///
    /// # Errors
    /// Why the connection must be closed.
    pub(super) fn reply(&mut self, header: Header, reply: Result<Reply, u32>) -> Result<(), Error> {
        let (flags, error, Reply { payload, fds }) = match reply {
            Ok(reply) => (TYPE_REPLY, 0, reply),
            Err(errno) => (TYPE_REPLY | ERROR, errno, Reply::default()),
        };
        let size = u32::try_from(HEADER + payload.len()).expect("a reply is at most as long as a message");
        let header = Header { id: header.id, command: header.command, size, flags, error };
        let mut bytes = Vec::with_capacity(HEADER + payload.len());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&payload);
        self.outgoing = Some(Outgoing { bytes, sent: 0, fds, since: Instant::now() });
        self.flush().map(drop)
    }

    /// Sends the outgoing reply. False if a part of it remains.
    fn flush(&mut self) -> Result<bool, Error> {
        let Some(outgoing) = &mut self.outgoing else { return Ok(true) };
        while outgoing.sent < outgoing.bytes.len() {
            match write(&self.socket, &outgoing.bytes[outgoing.sent..], &outgoing.fds) {
                Ok(count) => {
                    outgoing.sent += count;
                    // The kernel has sent them with the first byte.
                    outgoing.fds.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(Error::system("sendmsg")(errno)),
            }
        }
        self.outgoing = None;
        Ok(true)
    }
}

enum Fill {
    Full,
    Part,
    End,
}

fn read(socket: &UnixStream, bytes: &mut [u8]) -> Result<(usize, ReceivedFds), Errno> {
    // Room for one more than a message may have. So if the kernel has cut them off, it is not for lack of room here.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)?;
    let fds = ReceivedFds::take(&mut ancillary, received.flags.contains(ReturnFlags::CTRUNC));
    Ok((received.bytes, fds))
}

fn write(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
        assert!(fits, "a reply carries at most one descriptor");
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}
