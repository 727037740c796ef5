//! Where local clients connect: a UNIX socket, or a port of the loopback interface.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::socket::{Access, Listener, SocketError, take_inherited};
use crate::sys::peer_credentials;

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum LocalSocketError {
    /// The socket at a path.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The port.
    #[error("listen on {address}: {source}")]
    Port {
        /// Address and port.
        address: SocketAddr,
        /// The errno.
        source: io::Error,
    },
    /// A path that takes the place of another.
    #[error("put the socket at {path:?}: {source}")]
    Publish {
        /// The path.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalAddress {
    /// A UNIX socket to be created.
    Path(PathBuf),
    /// A port of the loopback interface.
    Port(SocketAddr),
}

impl FromStr for LocalAddress {
    type Err = String;

    /// An address with a port is one; anything else is a path.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Port(address)),
            Ok(address) => Err(format!(
                "{} is not a loopback address; give 127.0.0.1:{} or [::1]:{}, or a path, and let a proxy serve others",
                address.ip(),
                address.port(),
                address.port()
            )),
            Err(_) => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Port(address) => write!(f, "{address}"),
        }
    }
}

/// A socket at which clients wait. Dropping it removes its file.
pub struct LocalListener(Kind);

enum Kind {
    Unix(Listener),
    Tcp(TcpListener),
}

impl LocalListener {
    /// Listens at `address`. A UNIX socket is for those whom `access` lets in.
    ///
    /// # Errors
    /// See [`LocalSocketError`].
    pub fn open(address: &LocalAddress, access: &Access) -> Result<Self, LocalSocketError> {
        match address {
            LocalAddress::Path(path) => Ok(Self(Kind::Unix(Listener::bind(path.clone(), access)?))),
            LocalAddress::Port(address) => {
                let listen = || -> io::Result<TcpListener> {
                    let listener = TcpListener::bind(address)?;
                    listener.set_nonblocking(true).map(|()| listener)
                };
                let failed = |source| LocalSocketError::Port { address: *address, source };
                Ok(Self(Kind::Tcp(listen().map_err(failed)?)))
            }
        }
    }

    /// Takes a listening UNIX socket that was open when this program started.
    ///
    /// # Errors
    /// [`SocketError::NotASocket`].
    pub fn inherit(number: RawFd) -> Result<Self, LocalSocketError> {
        Ok(Self(Kind::Unix(Listener::adopt(take_inherited(number)?)?)))
    }

    /// Listens at a path at which another process of this program may still listen, and takes its place: who connects reaches
    /// either that process or this one.
    ///
    /// # Errors
    /// See [`LocalSocketError`].
    pub fn replace(path: &Path, access: &Access) -> Result<Self, LocalSocketError> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let mut listener = Listener::bind(beside.into(), access)?;
        listener.rename(path).map_err(|source| LocalSocketError::Publish { path: path.to_owned(), source })?;
        Ok(Self(Kind::Unix(listener)))
    }

    /// The next client and the user that it belongs to, which is not known of a port.
    pub(super) fn accept(&self) -> io::Result<Option<(OwnedFd, Option<u32>)>> {
        match accept_with(self, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(client) => {
                let uid = match self.0 {
                    Kind::Unix(_) => Some(peer_credentials(&client)?.uid),
                    Kind::Tcp(_) => None,
                };
                Ok(Some((client, uid)))
            }
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for LocalListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Unix(listener) => listener.socket.as_fd(),
            Kind::Tcp(listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_a_port_of_the_loopback_interface_can_be_listened_on() {
        assert_eq!("127.0.0.1:9100".parse(), Ok(LocalAddress::Port("127.0.0.1:9100".parse().unwrap())));
        assert_eq!("[::1]:9100".parse(), Ok(LocalAddress::Port("[::1]:9100".parse().unwrap())));
        assert_eq!("/run/m".parse(), Ok(LocalAddress::Path("/run/m".into())));
        for everywhere in ["0.0.0.0:9100", "[::]:9100", "10.0.0.1:80"] {
            let error = everywhere.parse::<LocalAddress>().unwrap_err();
            assert!(error.contains("is not a loopback address; give 127.0.0.1:"), "{error}");
        }
    }

    #[test]
    fn a_listener_takes_the_place_of_another_whose_end_does_not_remove_it() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("control");
        let first = LocalListener::open(&LocalAddress::Path(path.clone()), &Access::default()).unwrap();

        let second = LocalListener::replace(&path, &Access::default()).unwrap();
        drop(first);

        let _client = UnixStream::connect(&path).unwrap();
        assert!(second.accept().unwrap().is_some());
        drop(second);
        assert_eq!(std::fs::read_dir(directory.as_path()).unwrap().count(), 0, "no file is left behind");
    }
}
