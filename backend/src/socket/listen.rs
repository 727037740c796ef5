//! The sockets to which front-ends connect: a path, or a descriptor that was passed to this process.
//!
//! A stale socket file is removed only after a `connect` to it was refused. At the end, only the file that this process has
//! created is removed.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, listen, socket_with, sockopt};
use rustix::process::umask;

use super::access::{Access, SocketMode};
use super::error::{MAX_SOCKET_PATH, SocketError};
use super::file::{SocketFile, SocketFileState};
use super::peer::Peer;
use crate::sys::inherit;

/// Connections that wait to be accepted. The kernel allows `net.core.somaxconn` at most.
const BACKLOG: i32 = 128;

/// The socket to open.
pub enum Listen {
    /// A socket to be created at this path.
    Path(PathBuf),
    /// A socket that was passed in: listening, or connected to the only front-end.
    Fd(OwnedFd),
}

/// An open socket. It displays as one line for the log. Dropping it closes the socket, and removes the file that it created.
pub struct Endpoint(pub(crate) Socket);

pub(crate) enum Socket {
    Listening(Listener),
    Connected(UnixStream),
}

/// A listening socket, and its file if it was created here.
pub(crate) struct Listener {
    pub(crate) socket: UnixListener,
    name: String,
    file: Option<SocketFile>,
}

impl Listen {
    /// The socket that the service manager has passed to this process (sd_listen_fds(3)); there must be one. `count` is what the
    /// manager says how many there are.
    ///
    /// # Errors
    /// [`SocketError::ActivationCount`], [`SocketError::NotASocket`].
    pub fn activated(sockets: &[i32], count: &str) -> Result<Self, SocketError> {
        match sockets {
            [socket] => Self::inherited(*socket),
            _ => Err(SocketError::ActivationCount(count.to_owned())),
        }
    }

    /// The socket with this descriptor, inherited from the parent process.
    ///
    /// # Errors
    /// [`SocketError::NotASocket`] if the descriptor is not open, or was opened by this process itself.
    pub fn inherited(number: i32) -> Result<Self, SocketError> {
        take_inherited(number).map(Self::Fd)
    }

    /// Opens it. Front-ends can connect from now on; they wait until they are served.
    ///
    /// # Errors
    /// See [`SocketError`]: for example, the path is too long or in use, or the descriptor is not a UNIX stream socket.
    pub fn open(self) -> Result<Endpoint, SocketError> {
        self.open_for(&Access::default())
    }

    /// The same; a socket that is created here is for those whom `access` lets in.
    ///
    /// # Errors
    /// As for [`Self::open`], or the file cannot be given to its owner.
    pub fn open_for(self, access: &Access) -> Result<Endpoint, SocketError> {
        match self {
            Self::Path(path) => Listener::bind(path, access).map(Socket::Listening).map(Endpoint),
            Self::Fd(fd) => adopt(fd),
        }
    }
}

impl Endpoint {
    /// A listening socket that another process has handed over, with the file to remove at the end.
    ///
    /// # Errors
    /// [`SocketError::NotASocket`] if it is not a listening UNIX stream socket.
    pub fn inherit(socket: OwnedFd, name: String, file: Option<SocketFileState>) -> Result<Self, SocketError> {
        let Listener { socket, .. } = Listener::adopt(socket)?;
        Ok(Self(Socket::Listening(Listener { socket, name, file: file.map(SocketFile::inherit) })))
    }

    /// The front-end's connection, if there will never be another.
    #[must_use]
    pub fn connected(socket: UnixStream) -> Self {
        Self(Socket::Connected(socket))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Socket::Listening(listener) => f.write_str(&listener.name),
            Socket::Connected(_) => f.write_str("serving the front-end of an inherited, connected socket"),
        }
    }
}

/// Takes a descriptor that was open when this program started.
pub(crate) fn take_inherited(number: i32) -> Result<OwnedFd, SocketError> {
    let found = |error: io::Error| match error.kind() {
        ErrorKind::PermissionDenied => "it was not passed to this process".into(),
        _ => error.to_string(),
    };
    inherit(number).map_err(|error| SocketError::NotASocket { number, found: found(error) })
}

/// Takes an inherited socket, which may be listening or connected.
fn adopt(fd: OwnedFd) -> Result<Endpoint, SocketError> {
    let number = fd.as_raw_fd();
    let errno = |error: rustix::io::Errno| SocketError::NotASocket { number, found: error.to_string() };
    let domain = sockopt::socket_domain(&fd).map_err(errno)?;
    let kind = sockopt::socket_type(&fd).map_err(errno)?;
    if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
        return Err(SocketError::NotASocket { number, found: "a socket of another family or type".into() });
    }
    if !sockopt::socket_acceptconn(&fd).map_err(errno)? {
        return Ok(Endpoint(Socket::Connected(UnixStream::from(fd))));
    }
    let socket = UnixListener::from(fd);
    socket.set_nonblocking(true).map_err(|source| SocketError::System { step: "set O_NONBLOCK", source })?;
    Ok(Endpoint(Socket::Listening(Listener {
        socket,
        name: format!("listening on inherited socket {number}"),
        file: None,
    })))
}

impl Listener {
    /// Takes a listening socket that was opened elsewhere. Its file is not this process's.
    pub(crate) fn adopt(socket: OwnedFd) -> Result<Self, SocketError> {
        match adopt(socket)?.0 {
            Socket::Listening(listener) => Ok(listener),
            Socket::Connected(socket) => {
                let number = socket.as_raw_fd();
                Err(SocketError::NotASocket { number, found: "a socket that does not listen".into() })
            }
        }
    }

    /// Nobody can connect before the file has its mode and its owner.
    pub(crate) fn bind(path: PathBuf, access: &Access) -> Result<Self, SocketError> {
        let socket = match bind(&path, access.mode) {
            Err(SocketError::Path { source, .. }) if source.kind() == ErrorKind::AddrInUse => {
                remove_if_stale(&path)?;
                bind(&path, access.mode)?
            }
            other => other?,
        };
        let file = SocketFile::at(path.clone()).map_err(path_error(&path, "stat"))?;
        access.apply(&path).map_err(|source| SocketError::Owner {
            path: path.clone(),
            owner: access.to_string(),
            source,
        })?;
        listen(&socket, BACKLOG).map_err(|errno| path_error(&path, "listen")(errno.into()))?;
        let found = fs::symlink_metadata(&path).map_err(path_error(&path, "stat"))?;
        let (mode, uid, gid) = (found.permissions().mode() & 0o777, found.uid(), found.gid());
        let name = format!("listening on {} (mode {mode:03o}, uid {uid}, gid {gid})", path.display());
        Ok(Self { socket: socket.into(), name, file: Some(file) })
    }

    /// Moves its file to `path`, in place of what is there.
    pub(crate) fn rename(&mut self, path: &Path) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.rename(path)?;
            self.name = format!("listening on {}", path.display());
        }
        Ok(())
    }

    /// Its name, for the log.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The file to be removed at the end.
    pub(crate) fn file(&self) -> Option<SocketFileState> {
        self.file.as_ref().map(SocketFile::state)
    }

    /// Accepts the next front-end, if one is waiting.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

/// A socket that does not listen yet, at `path`. The mode of the file follows that of the socket, less the umask
/// (`unix_bind_bsd`). So it never has another one, and no link can be put in its place.
fn bind(path: &Path, mode: Option<SocketMode>) -> Result<OwnedFd, SocketError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(SocketError::PathTooLong { path: path.to_owned() });
    }
    let failed = |step| move |errno: rustix::io::Errno| path_error(path, step)(errno.into());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed("socket"))?;
    let address = SocketAddrUnix::new(path).map_err(failed("bind"))?;
    let Some(mode) = mode else {
        return rustix::net::bind(&socket, &address).map_err(failed("bind")).map(|()| socket);
    };
    fchmod(&socket, Mode::from_raw_mode(mode.bits())).map_err(failed("set its mode"))?;
    // This process has one thread yet, or creates no other file meanwhile.
    let umask = umask(Mode::empty());
    let bound = rustix::net::bind(&socket, &address);
    rustix::process::umask(umask);
    bound.map_err(failed("bind")).map(|()| socket)
}

/// Maps the errno of a step on `path`.
fn path_error(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Path { path: path.to_owned(), step, source }
}

/// Removes a socket file on which no process listens.
fn remove_if_stale(path: &Path) -> Result<(), SocketError> {
    if !fs::symlink_metadata(path).map_err(path_error(path, "stat"))?.file_type().is_socket() {
        return Err(SocketError::NotASocketFile { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Ok(stream) => {
            let holder = Peer::of(&stream).map_or_else(|_| "another process".into(), |peer| peer.to_string());
            Err(SocketError::PathTaken { path: path.to_owned(), holder })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            log::info!("removing the stale socket {}", path.display());
            fs::remove_file(path).map_err(path_error(path, "remove the stale socket"))
        }
        Err(error) => Err(path_error(path, "check whether a process listens there")(error)),
    }
}
