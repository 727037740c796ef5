//! The socket at which successors connect: for this user and root only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with, sockopt,
};

use super::description::ListenerState;
use super::descriptors::{Incoming, Outgoing};
use super::link::Link;
use crate::socket::SocketFile;
use crate::sys::peer_credentials;

/// A listening socket, and its file.
pub(super) struct Listener {
    socket: OwnedFd,
    file: SocketFile,
}

/// Who has connected.
pub(super) struct Applicant {
    pub(super) link: Link,
    pub(super) pid: Option<u32>,
    pub(super) uid: u32,
}

impl Listener {
    /// Listens at `path`, with mode 0600.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // The mode of the file follows that of the socket (unix_bind_bsd), so nobody else can ever connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        let address = SocketAddrUnix::new(path)?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_stale(path) => {
                std::fs::remove_file(path)?;
                bind(&socket, &address)?;
            }
            other => other?,
        }
        listen(&socket, 4)?;
        Ok(Self { socket, file: SocketFile::at(path.to_owned())? })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    /// The next process that has connected.
    pub(super) fn accept(&self) -> io::Result<Option<Applicant>> {
        match accept_with(&self.socket, SocketFlags::CLOEXEC) {
            Ok(socket) => {
                let credentials = peer_credentials(&socket)?;
                Ok(Some(Applicant { link: Link::adopt(socket)?, pid: credentials.pid, uid: credentials.uid }))
            }
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(super) fn describe(&self, outgoing: &mut Outgoing) -> io::Result<ListenerState> {
        let name = self.path().display().to_string();
        Ok(ListenerState { socket: outgoing.push(&self.socket)?, name, file: Some(self.file.state()) })
    }

    /// The predecessor's listener, if it listens at `path`.
    pub(super) fn inherit(state: ListenerState, path: &Path, descriptors: &mut Incoming) -> io::Result<Option<Self>> {
        let socket = descriptors.take(state.socket).map_err(io::Error::other)?;
        let Some(file) = state.file.map(SocketFile::inherit) else { return Ok(None) };
        if file.path() != path {
            return Ok(None);
        }
        if !sockopt::socket_acceptconn(&socket)? {
            return Err(Errno::INVAL.into());
        }
        Ok(Some(Self { socket, file }))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// True if nobody listens at the socket file `path`.
fn is_stale(path: &Path) -> bool {
    matches!(Link::connect(path), Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// True if a process of user `uid` may be the successor of one of user `own`.
pub(super) fn may_apply(uid: u32, own: u32) -> bool {
    uid == own || uid == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_this_user_and_root_may_be_the_successor() {
        assert!(may_apply(1000, 1000) && may_apply(0, 1000) && may_apply(0, 0));
        assert!(!may_apply(1001, 1000) && !may_apply(1000, 0));
    }

    #[test]
    fn nobody_else_can_connect_and_the_file_goes_with_the_listener() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("handover");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        let _link = Link::connect(&path).unwrap();
        let applicant = listener.accept().unwrap().unwrap();
        assert_eq!(applicant.pid, Some(std::process::id()));
        assert!(listener.accept().unwrap().is_none());
        assert!(Listener::bind(&path).is_err(), "somebody listens there");

        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_on_which_nobody_listens_is_replaced() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("handover");
        let stale = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&stale, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        drop(stale);

        let _listener = Listener::bind(&path).unwrap();

        assert!(Link::connect(&path).is_ok());
    }
}
