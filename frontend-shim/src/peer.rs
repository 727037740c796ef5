//! One connection: whole messages in, whole replies out, and never a wait for the other side. Whatever it sends costs at
//! most one request's work per turn of the loop; a peer that breaks the rules is worth one reply and then nothing.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};

use crate::budget::Budget;
use crate::registry::PeerId;
use crate::wire::{Garbled, REQUEST_BYTES, Reason, Reply, Request};

/// Requests at once, and then per second; a backend needs a handful in a VM's life.
const BURST: u32 = 64;
const REFILL: Duration = Duration::from_millis(50);
/// How long a connection may stay without HELLO.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// As this process sees it; 0 from another pid namespace.
    pub(crate) pid: i32,
    /// True once HELLO came.
    pub(crate) greeted: bool,
    socket: OwnedFd,
    deadline: Instant,
    budget: Budget,
}

/// What there was to receive.
pub(crate) enum Received {
    /// Nothing yet.
    Nothing,
    /// A request, with the descriptor that came along.
    Request(Request, Option<OwnedFd>),
    /// Something that ends the connection.
    Wrong(Reason),
    /// The other side has closed.
    Gone,
}

impl Peer {
    /// `socket` does not block.
    pub(crate) fn new(id: PeerId, pid: i32, socket: OwnedFd, now: Instant) -> Self {
        Self {
            id,
            pid,
            greeted: false,
            socket,
            deadline: now + HELLO_PATIENCE,
            budget: Budget::new(BURST, REFILL, now),
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// When HELLO must have come, if it has not.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        (!self.greeted).then_some(self.deadline)
    }

    pub(crate) fn receive(&mut self, now: Instant) -> Received {
        // One byte more than a request, so that a longer one is seen.
        let mut bytes = [0; REQUEST_BYTES + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Ok(message) if message.bytes > 0 => message,
            Err(Errno::AGAIN | Errno::INTR) => return Received::Nothing,
            Ok(_) | Err(_) => return Received::Gone,
        };
        // All are taken out, so that all are closed.
        let mut files = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                files.extend(rights);
            }
        }
        if !self.budget.take(now) {
            return Received::Wrong(Reason::Flood);
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || files.len() > 1 {
            return Received::Wrong(Reason::Malformed);
        }
        match Request::from_bytes(&bytes[..message.bytes]) {
            Ok(request) => Received::Request(request, files.pop()),
            Err(Garbled::Version(_)) => Received::Wrong(Reason::Version),
            Err(Garbled::Malformed) => Received::Wrong(Reason::Malformed),
        }
    }

    /// False if the peer does not read its replies, or has gone.
    pub(crate) fn reply(&self, reply: &Reply) -> bool {
        let bytes = reply.to_bytes();
        send(&self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) == Ok(bytes.len())
    }
}
