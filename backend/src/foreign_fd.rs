//! Descriptors that a front-end has passed along. One may be of anything, also of a file system that the front-end serves
//! itself (FUSE). Such a file system need not answer, and whoever asks it waits for ever. `fstat`, `read`, `poll` ask it, and
//! so does `close` (FUSE_FLUSH). So the kind of a descriptor is found out first, by calls that ask no file system, and what
//! is of no use is closed on a thread of its own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{AtFlags, StatxFlags, fcntl_get_seals, statx};
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, sockopt};

/// Descriptors of no use that may wait to be closed. The closing waits only for a file system that does not answer.
pub(crate) const MAX_UNCLOSED: usize = 64;
/// Longest name in a message, in characters. A path is the front-end's choice.
const MAX_NAME: usize = 80;

/// What a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file in memory: shmem (memfd, tmpfs) or hugetlbfs.
    Memory,
    /// An eventfd.
    Event,
    /// A UNIX socket.
    Socket,
    /// Anything else: it must not be used, nor closed where somebody waits.
    Other,
}

/// Why descriptors of a message cannot be used. They are lost; the message itself is not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableFds {
    /// The kernel had no room for them, and closed them (`MSG_CTRUNC`).
    #[error(
        "its file descriptors are lost, because this process can open no more files; raise RLIMIT_NOFILE (ulimit -n; \
         LimitNOFILE=)"
    )]
    NoRoom,
    /// One of them is of a kind that no command takes; its name.
    #[error("its file descriptor is of {0}, not of a file in memory (memfd, tmpfs, hugetlbfs) or an eventfd")]
    Foreign(String),
}

/// A descriptor that must be an eventfd is of something else; its name.
#[derive(Debug, thiserror::Error)]
#[error("its descriptor must be an eventfd, and is of {0}")]
pub struct NotAnEventfd(String);

/// Checks that `fd` is an eventfd. Only the kernel answers for one: a write to a pipe that nobody reads would wait.
pub(crate) fn check_eventfd(fd: impl AsFd) -> Result<(), NotAnEventfd> {
    if Kind::of(&fd) == Kind::Event { Ok(()) } else { Err(NotAnEventfd(name(fd))) }
}

impl Kind {
    pub(crate) fn of(fd: impl AsFd) -> Self {
        if is_memory(&fd) {
            Self::Memory
        } else if is_event(&fd) {
            Self::Event
        } else if sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX) {
            Self::Socket
        } else {
            Self::Other
        }
    }
}

/// The descriptors that came with some bytes, sorted.
#[derive(Default)]
pub(crate) struct ReceivedFds {
    /// Those that can be used.
    pub(crate) fds: Vec<OwnedFd>,
    /// How many came, usable or not.
    pub(crate) count: usize,
    /// Why some cannot be used. They are being closed elsewhere.
    pub(crate) unusable: Option<UnusableFds>,
    /// How many descriptors wait to be closed, of all front-ends.
    pub(crate) unclosed: usize,
}

impl ReceivedFds {
    /// Takes them out of `ancillary`, which has room for more descriptors than a message may have. `truncated` if the kernel
    /// has set `MSG_CTRUNC`.
    pub(crate) fn take(ancillary: &mut RecvAncillaryBuffer<'_>, truncated: bool) -> Self {
        let mut received = Self { unusable: truncated.then_some(UnusableFds::NoRoom), ..Self::default() };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                rights.for_each(|fd| received.add(fd));
            }
        }
        received
    }

    fn add(&mut self, fd: OwnedFd) {
        self.count += 1;
        if Kind::of(&fd) == Kind::Other {
            self.unusable = Some(UnusableFds::Foreign(name(&fd)));
            self.unclosed = close_elsewhere(fd);
        } else {
            self.fds.push(fd);
        }
    }
}

/// True for an eventfd: by its name, or, where procfs is not mounted, by what it does.
fn is_event(fd: impl AsFd) -> bool {
    match link(&fd) {
        Some(link) => link == Path::new("anon_inode:[eventfd]"),
        None => behaves_like_an_eventfd(fd),
    }
}

/// True if `fd` is of no file system, as an eventfd is not, and takes a zero. An eventfd adds it to its counter and never waits for
/// that (`eventfd_write`). Of the other files of the kernel, a VFIO device takes it as well, as a write to its first BAR, which whoever
/// has passed the device can do himself. The question which file system it is of is answered without asking that.
fn behaves_like_an_eventfd(fd: impl AsFd) -> bool {
    let file_system = |fd: BorrowedFd<'_>| {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        statx(fd, "", flags, StatxFlags::INO).map(|found| (found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
    };
    let Ok(own) = eventfd(0, EventfdFlags::CLOEXEC) else { return false };
    let same = file_system(own.as_fd()).is_ok_and(|own| file_system(fd.as_fd()) == Ok(own));
    same && rustix::io::write(fd, &0_u64.to_ne_bytes()) == Ok(8)
}

/// True for a file of shmem (memfd, tmpfs) or hugetlbfs. The kernel knows seals for no other.
pub(crate) fn is_memory(fd: impl AsFd) -> bool {
    fcntl_get_seals(fd).is_ok()
}

/// What the kernel calls the file, for a message: `"/some/path"`, `"pipe:[1234]"`.
pub(crate) fn name(fd: impl AsFd) -> String {
    let Some(link) = link(fd) else { return "something unknown (mount /proc for this process)".into() };
    let text = format!("{:?}", link.to_string_lossy());
    match text.char_indices().nth(MAX_NAME) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The kernel keeps this name itself.
fn link(fd: impl AsFd) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()
}

/// The descriptors that wait to be closed.
static UNCLOSED: AtomicUsize = AtomicUsize::new(0);

/// Closes `fd` without waiting for it. Returns how many descriptors wait to be closed; at more than [`MAX_UNCLOSED`] the
/// front-end that passes more of them must go.
pub(crate) fn close_elsewhere(fd: OwnedFd) -> usize {
    static CLOSER: OnceLock<Option<Sender<OwnedFd>>> = OnceLock::new();
    let waiting = UNCLOSED.fetch_add(1, Relaxed) + 1;
    let closer = CLOSER.get_or_init(|| {
        let (sender, receiver) = channel::<OwnedFd>();
        let close_each = move || {
            for fd in receiver {
                drop(fd);
                UNCLOSED.fetch_sub(1, Relaxed);
            }
        };
        let started = std::thread::Builder::new().name("closer".into()).spawn(close_each);
        started.ok().map(|_| sender)
    });
    match closer {
        Some(closer) => closer.send(fd).unwrap_or_else(|unsent| std::mem::forget(unsent.0)),
        // Without the thread it stays open until this process ends, which is better than to wait for ever.
        None => std::mem::forget(fd),
    }
    waiting
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn each_kind_is_recognized_without_asking_a_file_system() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        let procfs = std::fs::File::open("/proc/self/maps").unwrap();

        assert_eq!(Kind::of(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap()), Kind::Memory);
        assert_eq!(Kind::of(eventfd(0, EventfdFlags::CLOEXEC).unwrap()), Kind::Event);
        assert_eq!(Kind::of(socket), Kind::Socket);
        assert_eq!([Kind::of(pipe), Kind::of(writer), Kind::of(procfs)], [Kind::Other; 3]);
    }

    #[test]
    fn without_procfs_an_eventfd_is_recognized_by_what_it_does() {
        let event = eventfd(3, EventfdFlags::CLOEXEC).unwrap();
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let (pipe, writer) = rustix::pipe::pipe().unwrap();
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();

        assert!(behaves_like_an_eventfd(&event) && behaves_like_an_eventfd(&full), "full, and it did not wait");
        assert!(!behaves_like_an_eventfd(epoll) && !behaves_like_an_eventfd(pipe) && !behaves_like_an_eventfd(memory));
        assert!(!behaves_like_an_eventfd(writer), "nothing is written to it");
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 3, "unchanged");
    }

    #[test]
    fn a_file_is_not_taken_for_an_eventfd_by_its_name() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("anon_inode:[eventfd]");
        std::fs::write(&path, "").unwrap();
        assert_ne!(Kind::of(std::fs::File::open(path).unwrap()), Kind::Event);
    }

    #[test]
    fn a_name_is_short_and_has_no_control_characters() {
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join(format!("a\n{}", "x".repeat(200)));
        let name = name(std::fs::File::create(path).unwrap());
        assert!(name.chars().count() <= MAX_NAME + 1 && !name.contains('\n'), "{name}");
    }

    #[test]
    fn what_is_closed_elsewhere_is_closed() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();

        close_elsewhere(writer);

        // Blocks until the other end is closed.
        assert_eq!(rustix::io::read(&reader, &mut [0]).unwrap(), 0);
    }
}
