//! Eventfds, most of them a front-end's. `foreign_fd.rs` has made sure that they are eventfds.
//!
//! A write waits at an eventfd in blocking mode whose counter is full. `make_nonblocking` prevents that, until the
//! front-end, which shares the mode of the descriptor, changes it back. `signal_in_background` needs no such promise.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::rate_limited_log::SharedLog;

/// What a front-end can cause with each eventfd that it sends.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Sets O_NONBLOCK. The front-end chose this descriptor, and a thread that serves it must not wait on it.
pub(crate) fn make_nonblocking(event: impl AsFd) {
    let event = event.as_fd();
    let set = fcntl_getfl(event).and_then(|flags| fcntl_setfl(event, flags | OFlags::NONBLOCK));
    if let Err(errno) = set {
        LOG.warn(|| format!("make an eventfd non-blocking: {errno}"));
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
