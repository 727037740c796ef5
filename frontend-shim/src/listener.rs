//! The listening socket. It has mode 0600 from the moment it exists; 0666 if another user was named to whom it cannot be given,
//! because the server looks at each peer's credentials anyway. A socket left by a dead process is replaced.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Mode, Uid, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// Pending connections. The server accepts each at once, or refuses it with a reply.
const BACKLOG: i32 = 16;

fn seqpacket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Listens at `path`. If `peer` is not this process's user, it becomes the socket's owner, or else all users can connect.
///
/// # Errors
/// EADDRINUSE if another process listens there or the path is not a socket, ENAMETOOLONG, EACCES, …
pub(crate) fn listen_at(path: &Path, peer: Option<Uid>) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = seqpacket()?;
    // Before bind, which applies this mode to the file: no other user can connect at any time.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if is_dead(path, &address)? => {
            std::fs::remove_file(path)?;
            bind(&socket, &address)?;
        }
        other => other?,
    }
    let own = rustix::process::geteuid();
    check(path, own)?;
    if let Some(peer) = peer.filter(|&peer| peer != own) {
        // Root does not help: a program that has given up its capabilities needs the permission like any other.
        match std::os::unix::fs::chown(path, Some(peer.as_raw()), None) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                std::fs::set_permissions(path, Permissions::from_mode(0o666))?;
            }
            other => other?,
        }
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// True if `path` is a socket of this user on which nobody listens: left by a VMM that was killed.
fn is_dead(path: &Path, address: &SocketAddrUnix) -> io::Result<bool> {
    let found = path.symlink_metadata()?;
    let ours = found.file_type().is_socket() && found.uid() == rustix::process::geteuid().as_raw();
    Ok(ours && connect(&seqpacket()?, address) == Err(Errno::CONNREFUSED))
}

/// Checks that `path` is the socket just created, with its owner and mode.
fn check(path: &Path, own: Uid) -> io::Result<()> {
    let made = path.symlink_metadata()?;
    let as_made = made.file_type().is_socket() && made.uid() == own.as_raw();
    if as_made && made.permissions() == Permissions::from_mode(made.mode() & !0o777 | 0o600) {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "the socket does not have the owner and mode it was given"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A directory for one test.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("shim-listener-{}-{name}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn only_the_owner_can_connect() {
        let directory = Directory::new("mode");
        let path = directory.0.join("s");
        let _socket = listen_at(&path, None).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = Directory::new("dead");
        let path = directory.0.join("s");
        drop(listen_at(&path, None).unwrap());

        let live = listen_at(&path, None).unwrap();
        let second = listen_at(&path, None).unwrap_err();

        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(connect(seqpacket().unwrap(), &SocketAddrUnix::new(&path).unwrap()), Ok(()));
        drop(live);
    }

    #[test]
    fn a_regular_file_is_not_replaced() {
        let directory = Directory::new("file");
        let path = directory.0.join("s");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(listen_at(&path, None).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_path_too_long_is_refused() {
        let path = PathBuf::from("/tmp/".to_owned() + &"x".repeat(120));
        assert_eq!(listen_at(&path, None).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}
