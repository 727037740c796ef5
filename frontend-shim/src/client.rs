//! The backend's side: blocking calls, each with a time-out. After a missing or malformed answer the connection is unusable:
//! every later call fails, and the caller needs a new [`Client`].
//!
//! Registrations end with the connection. So keep the `Client` as long as the device can access guest memory, and watch its
//! descriptor ([`Client::socket`]): if it becomes readable while no request is pending, the VMM has closed the connection.
//!
//! ```no_run
//! # use kvm_vfio_shim::{Client, ClientError};
//! # fn run(device: std::path::PathBuf) -> Result<(), ClientError> {
//! let (mut shim, status) = Client::connect("/run/vm1/kvm.sock".as_ref(), Client::DEFAULT_TIMEOUT)?;
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
use crate::wire::{DecodeError, Dma, Kind, REPLY_BYTES, Reply, Request, Status, VERSION};

/// A connection to the shim in a VMM.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    serial: u32,
    /// `None` after a missing or malformed answer.
    socket: Option<OwnedFd>,
}

/// A registered device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registration {
    /// For [`Client::unregister`].
    pub handle: u64,
    /// The shim's state after the registration.
    pub status: Status,
}

/// Why a call failed.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens at the path.
    NotListening(PathBuf, io::Error),
    /// The socket exists, but this process cannot connect to it.
    Unreachable(PathBuf, io::Error),
    /// The listener is another user than this one, and neither is root.
    WrongUser(PathBuf, u32),
    /// No answer in time.
    TimedOut(PathBuf, Duration),
    /// The shim uses another version of the protocol.
    Version(PathBuf, u16),
    /// The answer is not a reply of this protocol.
    Malformed(PathBuf),
    /// The VMM has exited or has closed the connection.
    Closed(PathBuf),
    /// The shim refused the request.
    Refused(Refused),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match self {
            Self::Refused(refused) => return write!(f, "the VM's KVM shim refuses: {refused}"),
            Self::NotListening(path, _)
            | Self::Unreachable(path, _)
            | Self::WrongUser(path, _)
            | Self::TimedOut(path, _) => path,
            Self::Version(path, _) | Self::Malformed(path) | Self::Closed(path) => path,
        };
        let at = path.display();
        write!(f, "KVM shim at {at}: ")?;
        match self {
            Self::NotListening(_, error) => {
                write!(f, "{error}; start the VMM with LD_PRELOAD=libkvm_vfio_shim.so KVM_VFIO_SHIM_SOCKET={at}")
            }
            Self::Unreachable(_, error) => {
                write!(
                    f,
                    "{error}; run as the VMM's user, or start the VMM with KVM_VFIO_SHIM_UID set to this user's id"
                )
            }
            Self::WrongUser(_, uid) => write!(f, "uid {uid} listens there, which is neither this user nor root"),
            Self::TimedOut(_, waited) => {
                write!(f, "no answer within {waited:?}; the VMM is stopped, or under TCG with -daemonize")
            }
            Self::Version(_, theirs) => {
                write!(f, "it speaks version {theirs}, this is version {VERSION}; install both from one release")
            }
            Self::Malformed(_) => f.write_str("malformed answer; another program listens there"),
            Self::Closed(_) => {
                f.write_str("the connection is closed; the VMM has exited, or has closed it (its log says why)")
            }
            Self::Refused(_) => unreachable!("handled above"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NotListening(_, error) | Self::Unreachable(_, error) => Some(error),
            _ => None,
        }
    }
}

impl Client {
    /// Long enough for any answer: a registration may have to wait for a discard of guest memory.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

    /// Connects and sends HELLO. `timeout` limits this and every later call.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<(Self, Status), ClientError> {
        let socket = open(path, timeout).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotListening(path.into(), error),
            io::ErrorKind::WouldBlock => ClientError::TimedOut(path.into(), timeout),
            _ => ClientError::Unreachable(path.into(), error),
        })?;
        let own = rustix::process::geteuid();
        match sys::peer(&socket) {
            // Root has chosen the path and may pass its descriptors to any user.
            Ok((_, uid)) if uid == own.as_raw() || uid == 0 || own.is_root() => {}
            Ok((_, uid)) => return Err(ClientError::WrongUser(path.into(), uid)),
            Err(error) => return Err(ClientError::Unreachable(path.into(), error)),
        }
        let mut client = Self { path: path.into(), timeout, serial: 0, socket: Some(socket) };
        let reply = client.call(Kind::Hello, None)?;
        Ok((client, reply.status))
    }

    /// Number of the last request, for [`Self::resume`].
    #[must_use]
    pub fn serial(&self) -> u32 {
        self.serial
    }

    /// Goes on with a connection that another process has handed over, after its request number `serial`. Registrations on it
    /// last, because the connection never ends.
    #[must_use]
    pub fn resume(path: &Path, timeout: Duration, socket: OwnedFd, serial: u32) -> Self {
        Self { path: path.into(), timeout, serial, socket: Some(socket) }
    }

    /// Registers a device whose DMA always snoops the caches, before it can access guest memory. When this returns, discards
    /// of guest memory have no effect.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing is registered then.
    pub fn register_coherent(&mut self) -> Result<Registration, ClientError> {
        self.register(Dma::Coherent, None)
    }

    /// The same for a device whose DMA may be non-coherent. When this returns, it is registered with KVM as well. `file` is
    /// an open of the device's file for this purpose only, never bound to an iommufd.
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

    /// Ends a registration: the device can no longer access guest memory.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn unregister(&mut self, handle: u64) -> Result<Status, ClientError> {
        Ok(self.call(Kind::Unregister(handle), None)?.status)
    }

    /// Asks for the shim's state.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn query(&mut self) -> Result<Status, ClientError> {
        Ok(self.call(Kind::Query, None)?.status)
    }

    /// The connection's descriptor, to be watched; `None` once the connection is unusable.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Sends a request and returns the reply to it.
    fn call(&mut self, kind: Kind, file: Option<BorrowedFd<'_>>) -> Result<Reply, ClientError> {
        // Put back only after a complete exchange: a late answer must not be taken for the answer to the next request.
        let socket = self.socket.take().ok_or_else(|| ClientError::Closed(self.path.clone()))?;
        self.serial = self.serial.wrapping_add(1);
        let request = Request { serial: self.serial, kind };
        let reply = exchange(&socket, &request, file, Instant::now() + self.timeout).map_err(|error| match error {
            ExchangeError::TimedOut => ClientError::TimedOut(self.path.clone(), self.timeout),
            ExchangeError::Closed => ClientError::Closed(self.path.clone()),
            ExchangeError::Decode(DecodeError::Version(theirs)) => ClientError::Version(self.path.clone(), theirs),
            ExchangeError::Decode(DecodeError::Malformed) => ClientError::Malformed(self.path.clone()),
        })?;
        self.socket = Some(socket);
        match reply.outcome {
            Ok(_) => Ok(reply),
            Err(refusal) => Err(ClientError::Refused(Refused { refusal, status: reply.status })),
        }
    }
}

/// Why an exchange failed.
enum ExchangeError {
    TimedOut,
    Closed,
    Decode(DecodeError),
}

fn open(path: &Path, timeout: Duration) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // This also limits connect, which waits while the backlog is full (unix_stream_connect).
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn exchange(
    socket: &OwnedFd,
    request: &Request,
    file: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> Result<Reply, ExchangeError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(file) = &file {
        let fits = ancillary.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(file)));
        debug_assert!(fits, "there is space for one descriptor");
    }
    match sendmsg(socket, &[IoSlice::new(&request.to_bytes())], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) => {}
        Err(Errno::AGAIN) => return Err(ExchangeError::TimedOut),
        // The shim may have sent a last reply with the reason before it closed the connection.
        Err(_) => return receive(socket, None),
    }
    wait(socket, deadline)?;
    receive(socket, Some(request.serial))
}

/// Waits until there is something to receive.
fn wait(socket: &OwnedFd, deadline: Instant) -> Result<(), ExchangeError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| ExchangeError::TimedOut)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(ExchangeError::TimedOut),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(_) => return Err(ExchangeError::Closed),
        }
    }
}

/// Receives the reply to request `serial`, or the unsolicited one (serial 0) that the shim sends before it closes.
fn receive(socket: &OwnedFd, serial: Option<u32>) -> Result<Reply, ExchangeError> {
    let mut bytes = [0; REPLY_BYTES + 1];
    let length = match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((0, _)) | Err(_) => return Err(ExchangeError::Closed),
        Ok((length, _)) => length,
    };
    let reply = Reply::from_bytes(&bytes[..length]).map_err(ExchangeError::Decode)?;
    let unsolicited = reply.serial == 0 && reply.outcome.is_err();
    if unsolicited || Some(reply.serial) == serial {
        Ok(reply)
    } else {
        Err(ExchangeError::Decode(DecodeError::Malformed))
    }
}
