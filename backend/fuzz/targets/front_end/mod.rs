//! A front-end that sends the fuzzer's input over the socket, in pieces, some with file descriptors.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Longest time without a reply before the server counts as stuck. A ring may wait for commands that never complete.
const LIMIT: Duration = Duration::from_secs(20);

/// Descriptors that can accompany a piece: memfds and eventfds.
fn descriptors() -> &'static [OwnedFd] {
    static FDS: OnceLock<Vec<OwnedFd>> = OnceLock::new();
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let memory = |bytes| {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, bytes).unwrap();
        OwnedFd::from(file)
    };
    FDS.get_or_init(|| vec![memory(1 << 16), memory(1 << 12), event(), event()])
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

/// A connected socket pair. The first socket is for [`send_input`], the second for the server.
pub fn connect() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    (ours, theirs.into())
}

/// Sends `input`, a list of pieces: a bit mask of descriptors, a length, and that many bytes. Then closes the sending side and
/// checks that the server closes the connection.
pub fn send_input(ours: &UnixStream, input: &[u8]) {
    let fds = descriptors();
    let mut rest = input;
    while let [which, len, more @ ..] = rest {
        let (bytes, after) = more.split_at(more.len().min(usize::from(*len)));
        let chosen = (0..8).filter(|bit| which >> bit & 1 == 1);
        let chosen: Vec<_> = chosen.map(|bit| fds[bit % fds.len()].as_fd()).collect();
        if bytes.is_empty() || !send(ours, bytes, &chosen) {
            break;
        }
        rest = after;
    }
    ours.shutdown(Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    let mut ours = ours;
    if let Err(error) = ours.read_to_end(&mut answers) {
        let reset = error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(reset, "the server does not close the connection: {error}");
    }
}
