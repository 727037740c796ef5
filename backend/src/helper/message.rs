//! The messages between both processes, as JSON: each request has one answer with its number.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::memory::FileId;

/// Longest message, bytes.
const MAX: usize = 1024;

/// What is asked, with a number.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) number: u64,
    pub(super) what: What,
}

/// What is asked.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum What {
    /// The character device of the function.
    OpenCdev,
    /// The file of its group.
    OpenGroup,
    /// A container.
    OpenContainer,
    /// Start the installed program, with the descriptor of this message as its standard input.
    Start,
    /// Whether the process maps the file privately, at an address or everywhere.
    Maps { pid: u32, file: FileId, address: Option<u64> },
    /// The process that uses the function, other than the one that asks.
    Holder,
}

/// The answer. A descriptor comes with the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    Opened,
    /// The process, and with it a pidfd.
    Started {
        pid: u32,
    },
    Maps {
        privately: bool,
    },
    Holder {
        pid: Option<u32>,
    },
    /// The errno.
    Failed(i32),
}

/// The answer, with the number of its request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) number: u64,
    pub(super) answer: Answer,
}

/// Sends a message, with a descriptor or none.
///
/// # Errors
/// The errno.
pub(super) fn send(socket: impl AsFd, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one");
    }
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message and its descriptor; `None` when the other process has ended.
///
/// # Errors
/// The errno; [`io::ErrorKind::InvalidData`] for something else than a message.
pub(super) fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(M, Option<OwnedFd>)>> {
    let mut bytes = [0; MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let seen = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let fd = fds.flatten().last();
    if seen.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..seen.bytes])?, fd)))
}
