//! Eventfds, most of them a front-end's. A message can carry any descriptor, so one that arrives as an interrupt or a kick is
//! checked there, once. Only the kernel answers for an eventfd: a write to a file that the front-end itself serves (FUSE), or
//! to a pipe that nobody reads, would wait for the front-end.
//!
//! A write also waits at an eventfd in blocking mode whose counter is full. `make_nonblocking` prevents that, until the
//! front-end, which shares the mode of the descriptor, changes it back. `signal_in_background` needs no such promise.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// What `/proc/self/fd` shows for an eventfd (proc(5)). No file of a user has such a name: a path starts with a slash.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// A descriptor is not usable as an eventfd.
#[derive(Debug, thiserror::Error)]
pub enum EventfdError {
    /// It is something else.
    #[error("its descriptor must be an eventfd, and is {0:?}")]
    Other(PathBuf),
    /// The kernel does not tell what it is.
    #[error("its descriptor must be an eventfd, and /proc/self/fd does not tell: {0}; mount /proc for this process")]
    Unknown(io::Error),
}

impl EventfdError {
    /// The errno for the front-end.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Other(_) => libc::EINVAL,
            Self::Unknown(source) => source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Checks that `fd` is an eventfd. This asks no file system, so nobody can delay the answer.
///
/// # Errors
/// It is something else; or `/proc` is not mounted, so that nothing is an eventfd for certain.
pub(crate) fn check(fd: impl AsFd) -> Result<(), EventfdError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()));
    match link.map_err(EventfdError::Unknown)? {
        link if link == Path::new(EVENTFD) => Ok(()),
        other => Err(EventfdError::Other(other)),
    }
}

/// Sets O_NONBLOCK. The front-end chose this descriptor, and a thread that serves it must not wait on it.
pub(crate) fn make_nonblocking(event: impl AsFd) {
    let event = event.as_fd();
    let set = fcntl_getfl(event).and_then(|flags| fcntl_setfl(event, flags | OFlags::NONBLOCK));
    if let Err(errno) = set {
        log::warn!("make an eventfd non-blocking: {errno}");
    }
}

/// Adds one to an eventfd. A full one (EAGAIN) is as good as signalled; its reader has not looked yet.
pub(crate) fn signal(event: impl AsFd) {
    match rustix::io::write(event, &1_u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN) => {}
        Err(errno) => log::debug!("signal an eventfd: {errno}"),
    }
}

/// The same in a thread of its own, so that the caller never waits, whatever the front-end does with the eventfd. The thread
/// and the descriptor stay for as long as the eventfd is full and in blocking mode. So this is for rare signals.
///
/// # Errors
/// The errno of creating the thread.
pub(crate) fn signal_in_background(event: &Arc<OwnedFd>) -> io::Result<()> {
    let event = Arc::clone(event);
    std::thread::Builder::new().name("signal".into()).spawn(move || signal(&*event)).map(drop)
}

/// Takes what is in an eventfd; false if it cannot be read at all. An empty one (EAGAIN) is harmless: somebody else, or
/// an earlier look, has taken it.
pub(crate) fn drain(event: impl AsFd) -> bool {
    let mut count = [0; 8];
    matches!(rustix::io::read(event, &mut count), Ok(8) | Err(Errno::AGAIN | Errno::INTR))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    #[test]
    fn only_an_eventfd_passes_for_one() {
        let (pipe, _reader) = rustix::pipe::pipe().unwrap();
        let memory = memfd_create("anon_inode:[eventfd]", MemfdFlags::CLOEXEC).unwrap();
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let file = std::fs::File::create(directory.as_path().join(EVENTFD)).unwrap();

        assert!(check(eventfd(0, EventfdFlags::CLOEXEC).unwrap()).is_ok());
        for other in [pipe, memory, file.into()] {
            let error = check(&other).unwrap_err();
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
        }
    }

    #[test]
    fn a_full_eventfd_does_not_keep_who_signals_it_in_the_background() {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        rustix::io::write(&*event, &(u64::MAX - 1).to_ne_bytes()).unwrap();

        let (send, returned) = mpsc::channel();
        let shared = Arc::clone(&event);
        std::thread::spawn(move || send.send(signal_in_background(&shared).is_ok()).unwrap());
        let returned = returned.recv_timeout(Duration::from_secs(10));

        assert!(drain(&*event), "the counter was full");
        assert!(drain(&*event), "the signal follows once there is room");
        assert_eq!(returned, Ok(true), "before there was room");
    }
}
