//! One connection. Messages and replies are complete or absent, and no call blocks. A peer gets at most one request handled
//! per iteration of the server's loop. One that violates the protocol gets one last reply.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};

use crate::budget::Budget;
use crate::registry::PeerId;
use crate::wire::{DecodeError, REQUEST_BYTES, Reason, Reply, Request};

/// Requests accepted at once, and the time that earns another one. A backend sends a few in the life of a VM.
const BURST: u32 = 64;
const REFILL: Duration = Duration::from_millis(50);
/// Time within which HELLO must arrive.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// The peer's process, in this process's pid namespace; 0 if it has no id there.
    pub(crate) pid: i32,
    /// True once HELLO has arrived.
    pub(crate) greeted: bool,
    socket: OwnedFd,
    deadline: Instant,
    budget: Budget,
}

/// The result of a receive.
pub(crate) enum Received {
    /// No message is pending.
    Nothing,
    /// A request, with the descriptor that was sent with it.
    Request(Request, Option<OwnedFd>),
    /// An invalid message, which ends the connection.
    Invalid(Reason),
    /// The peer has closed the connection.
    Closed,
}

impl Peer {
    /// `socket` must be non-blocking.
    pub(crate) fn new(id: PeerId, pid: i32, socket: OwnedFd, now: Instant) -> Self {
        Self { id, pid, greeted: false, socket, deadline: now + HELLO_TIMEOUT, budget: Budget::new(BURST, REFILL, now) }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When HELLO must have arrived; `None` once it has.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        (!self.greeted).then_some(self.deadline)
    }

    pub(crate) fn receive(&mut self, now: Instant) -> Received {
        // One byte more than a request, to detect a message that is too long.
        let mut bytes = [0; REQUEST_BYTES + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Ok(message) if message.bytes > 0 => message,
            Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
            Ok(_) | Err(_) => return Received::Closed,
        };
        // Take ownership of all descriptors, so that all of them get closed.
        let mut files = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                files.extend(rights);
            }
        }
        if !self.budget.take(now) {
            return Received::Invalid(Reason::RateLimited);
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || files.len() > 1 {
            return Received::Invalid(Reason::Malformed);
        }
        match Request::from_bytes(&bytes[..message.bytes]) {
            Ok(request) => Received::Request(request, files.pop()),
            Err(DecodeError::Version(_)) => Received::Invalid(Reason::Version),
            Err(DecodeError::Malformed) => Received::Invalid(Reason::Malformed),
        }
    }

    /// Sends a reply. False if the peer does not read its replies or has closed the connection.
    pub(crate) fn reply(&self, reply: &Reply) -> bool {
        let bytes = reply.to_bytes();
        send(&self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) == Ok(bytes.len())
    }
}
