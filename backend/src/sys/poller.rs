//! An owned epoll instance on top of the `epoll` crate. Only the wait is `epoll_pwait2`, whose time-outs may be shorter than a
//! millisecond. A signal ends a wait early instead of failing it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use epoll::{ControlOptions, Events};
use rustix::event::Timespec;
use rustix::event::epoll as kernel;

/// An event on the descriptor that was added with `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The token passed to [`Poller::add`].
    pub token: u64,
    /// True if the peer has hung up or the descriptor is in error. There may still be data to read.
    pub hang_up: bool,
}

/// Waits for many descriptors: level-triggered if added with [`Self::add`], else edge-triggered.
pub struct Poller {
    fd: OwnedFd,
    ready: Vec<Event>,
}

/// Most events of one wait.
const MOST: usize = 64;

/// Readable while one of the level-triggered descriptors is.
impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Poller {
    /// Creates a poller without descriptors.
    ///
    /// # Errors
    /// The errno of `epoll_create1`.
    pub fn new() -> io::Result<Self> {
        let raw = epoll::create(true)?;
        // SAFETY: `epoll::create` has just returned this descriptor, and it has no other owner.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { fd, ready: Vec::with_capacity(MOST) })
    }

    /// Reports `token` while `source` is readable. A descriptor that has duplicates must be removed before it is closed.
    ///
    /// # Errors
    /// The errno of `epoll_ctl`.
    pub fn add(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, source, epoll::Event::new(Events::EPOLLIN, token))
    }

    /// Reports `token` once each time data arrives at `source` or its peer hangs up (EPOLLET). Data that has been reported
    /// and not been read is not reported again.
    ///
    /// # Errors
    /// The errno of `epoll_ctl`.
    pub fn add_edge(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        let interest = Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLET;
        self.control(ControlOptions::EPOLL_CTL_ADD, source, epoll::Event::new(interest, token))
    }

    /// Like [`Self::add_edge`], and also reports `token` each time `source` becomes writable again.
    ///
    /// # Errors
    /// The errno of `epoll_ctl`.
    pub fn add_duplex(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        let interest = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLRDHUP | Events::EPOLLET;
        self.control(ControlOptions::EPOLL_CTL_ADD, source, epoll::Event::new(interest, token))
    }

    /// Stops watching `source`.
    ///
    /// # Errors
    /// The errno of `epoll_ctl`.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, source, epoll::Event::new(Events::empty(), 0))
    }

    fn control(&self, option: ControlOptions, source: impl AsFd, interest: epoll::Event) -> io::Result<()> {
        epoll::ctl(self.fd.as_raw_fd(), option, source.as_fd().as_raw_fd(), interest)
    }

    /// Waits for events until `timeout` has passed, and calls `ready` for each. `None` waits forever. Returns the number of
    /// events. A signal ends the wait early with none.
    ///
    /// # Errors
    /// The errno of `epoll_pwait2`, except EINTR.
    pub fn wait(&mut self, timeout: Option<Duration>, mut ready: impl FnMut(Event)) -> io::Result<usize> {
        // A time-out that no timespec can hold is as good as none.
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        self.wait_until(timeout)?;
        self.ready.iter().copied().for_each(&mut ready);
        Ok(self.ready.len())
    }

    /// One `epoll_pwait2`.
    fn look(&mut self, timeout: Option<&Timespec>) -> rustix::io::Result<()> {
        // Not kept in `self`, because the kernel's events may not be sent to another thread.
        let mut events = [MaybeUninit::uninit(); MOST];
        self.ready.clear();
        let (events, _) = kernel::wait(&self.fd, &mut events[..], timeout)?;
        let broken = kernel::EventFlags::HUP | kernel::EventFlags::RDHUP | kernel::EventFlags::ERR;
        self.ready.extend(events.iter().map(|event| {
            let (flags, data) = (event.flags, event.data);
            Event { token: data.u64(), hang_up: flags.intersects(broken) }
        }));
        Ok(())
    }
}

impl Poller {
    #[cfg(not(feature = "shuttle"))]
    fn wait_until(&mut self, timeout: Option<Timespec>) -> io::Result<()> {
        match self.look(timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => Ok(()),
            other => Ok(other?),
        }
    }

    /// All threads of such a test share one of the kernel's, so none may wait there. A time-out may pass at any time.
    #[cfg(feature = "shuttle")]
    fn wait_until(&mut self, timeout: Option<Timespec>) -> io::Result<()> {
        use shuttle::rand::{Rng, thread_rng};
        let now = Timespec::default();
        loop {
            self.look(Some(&now))?;
            let passed = timeout == Some(now) || (timeout.is_some() && thread_rng().gen_ratio(1, 16));
            if passed || !self.ready.is_empty() {
                return Ok(());
            }
            shuttle::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_signalled_descriptor_is_reported_with_its_token() {
        let mut poller = Poller::new().unwrap();
        let (quiet, loud) = (eventfd(0, EventfdFlags::CLOEXEC).unwrap(), eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        poller.add(&quiet, 1).unwrap();
        poller.add(&loud, 2).unwrap();
        rustix::io::write(&loud, &1_u64.to_ne_bytes()).unwrap();

        let mut seen = Vec::new();
        poller.wait(None, |event| seen.push(event)).unwrap();

        assert_eq!(seen, [Event { token: 2, hang_up: false }]);
    }

    #[test]
    fn an_edge_is_reported_once_per_write() {
        let mut poller = Poller::new().unwrap();
        let source = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        poller.add_edge(&source, 7).unwrap();
        let mut reports = Vec::new();

        for _ in 0..2 {
            rustix::io::write(&source, &1_u64.to_ne_bytes()).unwrap();
            for _ in 0..2 {
                reports.push(poller.wait(Some(Duration::ZERO), |_| ()).unwrap());
            }
        }

        assert_eq!(reports, [1, 0, 1, 0]);
    }

    #[test]
    fn a_wait_ends_after_its_timeout() {
        let mut poller = Poller::new().unwrap();
        assert_eq!(poller.wait(Some(Duration::from_millis(1)), |_| ()).unwrap(), 0);
    }
}
