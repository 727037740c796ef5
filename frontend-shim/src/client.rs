//! The backend's side: blocking calls, each with an end in time. After an answer that did not come, or that cannot be
//! understood, the connection is of no use; every call then says so, and a new [`Client`] starts afresh.
//!
//! What was registered ends with the connection. So a `Client` is kept as long as the device reaches guest memory, and its
//! descriptor is watched ([`AsFd`]): readable while no request is under way means that the VMM has gone.
//!
//! ```no_run
//! # use kvm_vfio_shim::{Client, ClientError};
//! # fn run(device: std::path::PathBuf) -> Result<(), ClientError> {
//! let (mut shim, status) = Client::connect("/run/vm1/kvm.sock".as_ref(), Client::PATIENCE)?;
//! println!("policy {}, non-coherent DMA so far: {}", status.policy, status.non_coherent());
//! // Before memory is mapped: a second open of the device's file, never bound to an iommufd.
//! let unbound = std::fs::File::open(device).expect("a device");
//! let registration = shim.register_non_coherent(&unbound)?;
//! // … map, run, unmap …
//! shim.unregister(registration.handle)?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recv, sendmsg, socket_with,
};

use crate::explain::Refused;
use crate::sys;
use crate::wire::{Dma, Garbled, Kind, REPLY_BYTES, Reply, Request, Status, VERSION};

/// A connection to the shim in a VMM.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    patience: Duration,
    serial: u32,
    /// `None` once an answer did not come or could not be understood.
    socket: Option<OwnedFd>,
}

/// A device that the shim knows of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// For [`Client::unregister`].
    pub handle: u64,
    /// How things stand now.
    pub status: Status,
}

/// Why the shim did not do what was asked.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens at the path.
    Absent(PathBuf, io::Error),
    /// The socket is there, but not for this process.
    Unreachable(PathBuf, io::Error),
    /// The one who listens is another user than this one, and neither is root.
    Stranger(PathBuf, u32),
    /// No answer in time.
    Silent(PathBuf, Duration),
    /// The answer is of another version.
    Version(PathBuf, u16),
    /// The answer is none.
    Garbled(PathBuf),
    /// The VMM has gone, or has closed the connection.
    Gone(PathBuf),
    /// The shim said no.
    Refused(Refused),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match self {
            Self::Refused(refused) => return write!(f, "the VM's KVM shim refuses: {refused}"),
            Self::Absent(path, _) | Self::Unreachable(path, _) | Self::Stranger(path, _) | Self::Silent(path, _) => {
                path
            }
            Self::Version(path, _) | Self::Garbled(path) | Self::Gone(path) => path,
        };
        let at = path.display();
        write!(f, "KVM shim at {at}: ")?;
        match self {
            Self::Absent(_, error) => {
                write!(f, "{error}; start the VMM with LD_PRELOAD=libkvm_vfio_shim.so KVM_VFIO_SHIM_SOCKET={at}")
            }
            Self::Unreachable(_, error) => {
                write!(
                    f,
                    "{error}; run as the VMM's user, or start the VMM with KVM_VFIO_SHIM_UID set to this user's id"
                )
            }
            Self::Stranger(_, uid) => write!(f, "uid {uid} listens there, who is neither this user nor root"),
            Self::Silent(_, waited) => {
                write!(f, "no answer within {waited:?}; the VMM is stopped, or under TCG with -daemonize")
            }
            Self::Version(_, theirs) => {
                write!(f, "it speaks version {theirs}, this is version {VERSION}; install both from one release")
            }
            Self::Garbled(_) => f.write_str("the answer cannot be understood; something else listens there"),
            Self::Gone(_) => {
                f.write_str("the connection has ended; the VMM has exited, or dropped it (its log says why)")
            }
            Self::Refused(_) => unreachable!("dealt with above"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Absent(_, error) | Self::Unreachable(_, error) => Some(error),
            _ => None,
        }
    }
}

impl Client {
    /// Time enough for any answer: a registration may have to wait for a discard of guest memory.
    pub const PATIENCE: Duration = Duration::from_secs(5);

    /// Connects and says HELLO. Every later call, too, takes no longer than `patience`.
    ///
    /// # Errors
    /// What is there instead of a shim that serves this user.
    pub fn connect(path: &Path, patience: Duration) -> Result<(Self, Status), ClientError> {
        let socket = open(path, patience).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::Absent(path.into(), error),
            io::ErrorKind::WouldBlock => ClientError::Silent(path.into(), patience),
            _ => ClientError::Unreachable(path.into(), error),
        })?;
        let own = rustix::process::geteuid();
        match sys::peer(&socket) {
            // Root gives the descriptors it likes to whom it likes, and has chosen the path.
            Ok((_, uid)) if uid == own.as_raw() || uid == 0 || own.is_root() => {}
            Ok((_, uid)) => return Err(ClientError::Stranger(path.into(), uid)),
            Err(error) => return Err(ClientError::Unreachable(path.into(), error)),
        }
        let mut client = Self { path: path.into(), patience, serial: 0, socket: Some(socket) };
        let reply = client.call(Kind::Hello, None)?;
        Ok((client, reply.status))
    }

    /// Announces that a device whose DMA always snoops the caches is about to reach guest memory. When this returns,
    /// discards of guest memory have no effect any more.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing is registered then.
    pub fn register_coherent(&mut self) -> Result<Registration, ClientError> {
        self.register(Dma::Coherent, None)
    }

    /// The same for a device whose DMA may go behind the caches; when this returns, KVM knows. `file` is the device's:
    /// opened for this only, never bound.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing is registered then.
    pub fn register_non_coherent(&mut self, file: impl AsFd) -> Result<Registration, ClientError> {
        self.register(Dma::NonCoherent, Some(file.as_fd()))
    }

    fn register(&mut self, dma: Dma, file: Option<BorrowedFd<'_>>) -> Result<Registration, ClientError> {
        let reply = self.call(Kind::Register(dma), file)?;
        Ok(Registration { handle: reply.outcome.unwrap_or_default(), status: reply.status })
    }

    /// The device reaches guest memory no longer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn unregister(&mut self, handle: u64) -> Result<Status, ClientError> {
        Ok(self.call(Kind::Unregister(handle), None)?.status)
    }

    /// Asks how things stand.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn query(&mut self) -> Result<Status, ClientError> {
        Ok(self.call(Kind::Query, None)?.status)
    }

    /// Its descriptor, to be watched; `None` once the connection is of no use.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// A reply whose outcome is good, or the error.
    fn call(&mut self, kind: Kind, file: Option<BorrowedFd<'_>>) -> Result<Reply, ClientError> {
        // Put back only after a whole exchange: a late answer must not be taken for the next request's.
        let socket = self.socket.take().ok_or_else(|| ClientError::Gone(self.path.clone()))?;
        self.serial = self.serial.wrapping_add(1);
        let request = Request { serial: self.serial, kind };
        let reply = exchange(&socket, &request, file, Instant::now() + self.patience).map_err(|error| match error {
            Broken::Late => ClientError::Silent(self.path.clone(), self.patience),
            Broken::Closed => ClientError::Gone(self.path.clone()),
            Broken::Garbled(Garbled::Version(theirs)) => ClientError::Version(self.path.clone(), theirs),
            Broken::Garbled(Garbled::Malformed) => ClientError::Garbled(self.path.clone()),
        })?;
        self.socket = Some(socket);
        match reply.outcome {
            Ok(_) => Ok(reply),
            Err(refusal) => Err(ClientError::Refused(Refused { refusal, status: reply.status })),
        }
    }
}

/// Why an exchange did not come to its end.
enum Broken {
    Late,
    Closed,
    Garbled(Garbled),
}

fn open(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // Bounds the connect as well (unix_stream_connect): it waits while the backlog is full.
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn exchange(
    socket: &OwnedFd,
    request: &Request,
    file: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> Result<Reply, Broken> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(file) = &file {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(file)));
        debug_assert!(fits, "there is space for one descriptor");
    }
    match sendmsg(socket, &[IoSlice::new(&request.to_bytes())], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) => {}
        Err(Errno::AGAIN) => return Err(Broken::Late),
        // A last reply may be waiting that says why it closed.
        Err(_) => return receive(socket, None),
    }
    wait(socket, deadline)?;
    receive(socket, Some(request.serial))
}

/// Until there is something to receive.
fn wait(socket: &OwnedFd, deadline: Instant) -> Result<(), Broken> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Broken::Late)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(Broken::Late),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(_) => return Err(Broken::Closed),
        }
    }
}

/// The reply to request `serial`, or one that nobody asked for (serial 0), with which the shim closes.
fn receive(socket: &OwnedFd, serial: Option<u32>) -> Result<Reply, Broken> {
    let mut bytes = [0; REPLY_BYTES + 1];
    let length = match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((0, _)) | Err(_) => return Err(Broken::Closed),
        Ok((length, _)) => length,
    };
    let reply = Reply::from_bytes(&bytes[..length]).map_err(Broken::Garbled)?;
    let farewell = reply.serial == 0 && reply.outcome.is_err();
    if farewell || Some(reply.serial) == serial { Ok(reply) } else { Err(Broken::Garbled(Garbled::Malformed)) }
}
