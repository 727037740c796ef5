//! The descriptors that move with a description, by number. Each is taken exactly once.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fstat};
use serde::{Deserialize, Serialize};

use super::description::FdNumber;

/// Most descriptors of a session: memory files, three of each ring, sockets, the device.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// A number in a description stands for no descriptor, or for one that was taken already.
#[derive(Debug, thiserror::Error)]
#[error("the description names descriptor {0}, which did not come with it or is named twice")]
pub struct DescriptorError(u32);

/// Which file a descriptor is of, among the kinds that a session has. Eventfds share one inode and have a number of their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FdKey(String);

impl FdKey {
    /// # Errors
    /// The errno, or `/proc` is not mounted.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()))?;
        // proc_pid_fdinfo(5)
        if let Some(id) = info.lines().find(|line| line.starts_with("eventfd-id:")) {
            return Ok(Self(id.to_owned()));
        }
        let stat = fstat(&fd)?;
        let access = fcntl_getfl(&fd)? & OFlags::RWMODE;
        Ok(Self(format!("{}:{} {:o}", stat.st_dev, stat.st_ino, access.bits())))
    }
}

/// Descriptors to be sent. Their numbers count from 0, unless some are at the receiver already.
#[derive(Debug, Default)]
pub struct Outgoing {
    fds: Vec<OwnedFd>,
    next: u32,
    there: Option<There>,
}

/// What the receiver has already.
#[derive(Debug)]
struct There {
    known: HashMap<FdKey, u32>,
    used: HashMap<FdKey, u32>,
}

/// Descriptors that were received.
#[derive(Debug, Default)]
pub struct Incoming {
    fds: HashMap<u32, OwnedFd>,
    /// A number may be taken more than once.
    shared: bool,
}

impl Outgoing {
    /// For a receiver that has the descriptors of the files in `known`. Others are numbered from `next` on, each file once.
    #[must_use]
    pub fn beside(known: HashMap<FdKey, u32>, next: u32) -> Self {
        Self { fds: Vec::new(), next, there: Some(There { known, used: HashMap::new() }) }
    }

    /// Adds a duplicate of `fd`.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn push(&mut self, fd: impl AsFd) -> io::Result<FdNumber> {
        if let Some(There { known, used }) = &mut self.there {
            let key = FdKey::of(&fd)?;
            if let Some(number) = used.get(&key).or_else(|| known.get(&key)).copied() {
                used.insert(key, number);
                return Ok(FdNumber(number));
            }
            used.insert(key, self.next);
        }
        let number = self.next;
        self.next = number.checked_add(1).ok_or(io::ErrorKind::QuotaExceeded)?;
        self.fds.push(fd.as_fd().try_clone_to_owned()?);
        Ok(FdNumber(number))
    }

    /// Adds a duplicate of `fd` if there is one.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn push_some(&mut self, fd: Option<impl AsFd>) -> io::Result<Option<FdNumber>> {
        fd.map(|fd| self.push(fd)).transpose()
    }

    /// Those that are not at the receiver, in the order of their numbers.
    #[must_use]
    pub fn as_slice(&self) -> &[OwnedFd] {
        &self.fds
    }

    /// The number of the next descriptor.
    #[must_use]
    pub fn next_number(&self) -> u32 {
        self.next
    }

    /// The files that were added, old and new, with their numbers.
    #[must_use]
    pub fn into_used(self) -> HashMap<FdKey, u32> {
        self.there.map(|there| there.used).unwrap_or_default()
    }
}

impl Incoming {
    /// Numbers `fds` from 0.
    #[must_use]
    pub fn counted(fds: Vec<OwnedFd>) -> Self {
        Self { fds: (0..).zip(fds).collect(), shared: false }
    }

    /// Descriptors with numbers of their own, where a number stands for a file.
    #[must_use]
    pub fn numbered(fds: HashMap<u32, OwnedFd>) -> Self {
        Self { fds, shared: true }
    }

    /// Takes a descriptor.
    ///
    /// # Errors
    /// There is none with this number (any more).
    pub fn take(&mut self, number: FdNumber) -> Result<OwnedFd, DescriptorError> {
        let unknown = || DescriptorError(number.0);
        if self.shared {
            return self.fds.get(&number.0).and_then(|fd| fd.try_clone().ok()).ok_or_else(unknown);
        }
        self.fds.remove(&number.0).ok_or_else(unknown)
    }

    /// Duplicates a descriptor, which can still be taken.
    ///
    /// # Errors
    /// There is none with this number (any more), or the errno of `fcntl`.
    pub fn duplicate(&self, number: FdNumber) -> io::Result<OwnedFd> {
        self.fds.get(&number.0).ok_or_else(|| io::Error::other(DescriptorError(number.0)))?.try_clone()
    }

    /// Takes a descriptor if one is named.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_some(&mut self, number: Option<FdNumber>) -> Result<Option<OwnedFd>, DescriptorError> {
        number.map(|number| self.take(number)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_file_that_the_receiver_has_is_not_sent_again_and_eventfds_are_told_apart() {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (one, two, three) = (event(), event(), event());
        let known = HashMap::from([(FdKey::of(&one).unwrap(), 7)]);
        let mut outgoing = Outgoing::beside(known, 9);

        let numbers = [&two, &one, &three, &two].map(|fd| outgoing.push(fd).unwrap().0);

        assert_eq!(numbers, [9, 7, 10, 9]);
        assert_eq!((outgoing.as_slice().len(), outgoing.next_number()), (2, 11));
        assert_eq!(outgoing.into_used().len(), 3);
    }

    #[test]
    fn a_descriptor_can_be_taken_once() {
        let (one, other) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::default();
        assert_eq!((outgoing.push(&one).unwrap(), outgoing.push(&other).unwrap()), (FdNumber(0), FdNumber(1)));

        let mut incoming = Incoming::counted(outgoing.fds);

        assert!(incoming.take(FdNumber(1)).is_ok());
        assert!(incoming.take(FdNumber(1)).is_err(), "named twice");
        assert!(incoming.take(FdNumber(2)).is_err(), "did not come");
        assert!(incoming.take_some(None).unwrap().is_none());
    }
}
