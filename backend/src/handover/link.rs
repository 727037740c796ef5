//! The socket between predecessor and successor: packets (`SOCK_SEQPACKET`), so that a message arrives whole or not at all. Every
//! wait is limited.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg,
    shutdown, socket_with, socketpair, sockopt,
};

use super::descriptors::MAX_DESCRIPTORS;
use super::message::{MAX_BYTES, MAX_FDS, Message};

/// How long the other process may take for each step. A controller may need most of it to start.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// A connection to the other process.
pub struct Link {
    socket: OwnedFd,
    limit: Duration,
}

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other process has closed the connection.
    #[error("the other process is gone")]
    Closed,
    /// The other process is silent.
    #[error("the other process has been silent for {0:?}")]
    Silent(Duration),
    /// What came is no message.
    #[error("{0}")]
    Malformed(String),
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl LinkError {
    fn system(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::System(step, other.into()),
        }
    }
}

impl Link {
    /// Connects to the process that listens at `path`.
    ///
    /// # Errors
    /// The errno.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        Ok(Self { socket, limit: LIMIT })
    }

    /// Both ends of a connection.
    ///
    /// # Errors
    /// The errno.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket: one, limit: LIMIT }, Self { socket: other, limit: LIMIT }))
    }

    /// A connection that was inherited or accepted.
    ///
    /// # Errors
    /// EPROTOTYPE if it is not a UNIX socket for packets; the errno of `getsockopt`.
    pub fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let fits = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
            && sockopt::socket_type(&socket)? == SocketType::SEQPACKET;
        if fits { Ok(Self { socket, limit: LIMIT }) } else { Err(Errno::PROTOTYPE.into()) }
    }

    /// The socket, for a child process.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    #[cfg(test)]
    pub(super) fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        self.send_with(message, &[])
    }

    /// Sends descriptors, in as many messages as they need.
    pub(super) fn send_descriptors(&mut self, fds: &[OwnedFd]) -> Result<(), LinkError> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        fds.chunks(MAX_FDS).try_for_each(|fds| self.send_with(&Message::Descriptors, fds))
    }

    fn send_with(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.wait(PollFlags::OUT)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "at most MAX_FDS");
        }
        let bytes = message.to_bytes();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags).map_err(LinkError::system("send"))?;
        Ok(())
    }

    /// Receives the next message, which must bring no descriptors.
    pub(super) fn receive(&mut self) -> Result<Message, LinkError> {
        match self.receive_with()? {
            (message, fds) if fds.is_empty() => Ok(message),
            (message, _) => Err(LinkError::Malformed(format!("{} with descriptors", message.name()))),
        }
    }

    /// Receives `count` descriptors.
    pub(super) fn receive_descriptors(&mut self, count: usize) -> Result<Vec<OwnedFd>, LinkError> {
        if count > MAX_DESCRIPTORS {
            return Err(LinkError::Malformed(format!("{count} descriptors, at most {MAX_DESCRIPTORS}")));
        }
        let mut all = Vec::new();
        while all.len() < count {
            match self.receive_with()? {
                (Message::Descriptors, fds) if !fds.is_empty() => all.extend(fds),
                (other, fds) => {
                    return Err(LinkError::Malformed(format!("{} with {} descriptors", other.name(), fds.len())));
                }
            }
        }
        if all.len() == count { Ok(all) } else { Err(LinkError::Malformed("more descriptors than announced".into())) }
    }

    fn receive_with(&mut self) -> Result<(Message, Vec<OwnedFd>), LinkError> {
        self.wait(PollFlags::IN)?;
        let mut bytes = vec![0; MAX_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let seen = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
            .map_err(LinkError::system("receive"))?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if seen.bytes == 0 {
            return Err(LinkError::Closed);
        }
        if seen.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
            let problem = "a message is too long, or this process can open no more files (RLIMIT_NOFILE)";
            return Err(LinkError::Malformed(problem.into()));
        }
        Message::parse(&bytes[..seen.bytes]).map(|message| (message, fds)).map_err(LinkError::Malformed)
    }

    fn wait(&self, flags: PollFlags) -> Result<(), LinkError> {
        let deadline = Instant::now() + self.limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let time = Timespec::try_from(left).map_err(|_| LinkError::Silent(self.limit))?;
            match poll(&mut [PollFd::new(&self.socket, flags)], Some(&time)) {
                Ok(0) => return Err(LinkError::Silent(self.limit)),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(LinkError::system("poll")(errno)),
            }
        }
    }

    /// Closes both directions. The kernel accepts no message of the other process any more; those that it has accepted can still
    /// be read (unix_shutdown, unix_dgram_sendmsg: both hold the lock of this socket).
    pub(super) fn shut(&mut self) {
        // It fails only for a socket that is not connected, where nothing arrives either.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Reads what came before [`Self::shut`]. True if TAKEN was among it.
    pub(super) fn drain_taken(&mut self) -> bool {
        loop {
            match self.receive_with() {
                Ok((Message::Taken, _)) => return true,
                Ok(_) | Err(LinkError::Malformed(_)) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_descriptors_arrive_in_their_order() {
        let (mut one, mut other) = Link::pair().unwrap();
        let (file, _keep) = rustix::pipe::pipe().unwrap();
        let files: Vec<_> = (0..2 * MAX_FDS + 1).map(|_| file.try_clone().unwrap()).collect();

        one.send_descriptors(&files).unwrap();

        assert_eq!(other.receive_descriptors(files.len()).unwrap().len(), files.len());
    }

    #[test]
    fn more_or_fewer_descriptors_than_announced_are_refused() {
        let (mut one, mut other) = Link::pair().unwrap();
        let (file, _keep) = rustix::pipe::pipe().unwrap();
        one.send_descriptors(&[file.try_clone().unwrap(), file]).unwrap();
        assert!(other.receive_descriptors(1).is_err());
        assert!(other.receive_descriptors(MAX_DESCRIPTORS + 1).is_err(), "more than any session has");
        one.send(&Message::Descriptors).unwrap();
        assert!(other.receive_descriptors(1).is_err(), "a message without any");
    }

    #[test]
    fn what_came_before_the_connection_was_shut_is_read_and_nothing_comes_after() {
        let (mut one, mut other) = Link::pair().unwrap();
        other.send(&Message::Ready).unwrap();
        other.send(&Message::Taken).unwrap();
        one.shut();
        assert!(matches!(other.send(&Message::Taken), Err(LinkError::Closed)));
        assert!(one.drain_taken());

        let (mut one, mut other) = Link::pair().unwrap();
        other.send(&Message::Ready).unwrap();
        one.shut();
        assert!(matches!(other.send(&Message::Taken), Err(LinkError::Closed)));
        assert!(!one.drain_taken());
    }

    #[test]
    fn a_silent_process_is_not_waited_for_and_one_that_is_gone_is_noticed() {
        let (mut one, other) = Link::pair().unwrap();
        one = one.with_limit(Duration::from_millis(1));
        assert!(matches!(one.receive(), Err(LinkError::Silent(_))));
        drop(other);
        assert!(matches!(one.receive(), Err(LinkError::Closed)));
        assert!(matches!(one.send(&Message::Go), Err(LinkError::Closed)));
    }

    #[test]
    fn a_stream_socket_is_not_adopted() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Link::adopt(one.into()).is_err());
    }
}
