//! The descriptors that move with a description, by number. Each is taken exactly once.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::description::FdNumber;

/// Most descriptors of a session: memory files, three of each ring, sockets, the device.
pub(super) const MAX_DESCRIPTORS: usize = 1024;

/// A number in a description stands for no descriptor, or for one that was taken already.
#[derive(Debug, thiserror::Error)]
#[error("the description names descriptor {0}, which did not come with it or is named twice")]
pub struct DescriptorError(u32);

/// Descriptors to be sent. Their numbers count from 0.
#[derive(Debug, Default)]
pub struct Outgoing {
    fds: Vec<OwnedFd>,
}

/// Descriptors that were received.
#[derive(Debug, Default)]
pub struct Incoming {
    fds: HashMap<u32, OwnedFd>,
}

impl Outgoing {
    /// Adds a duplicate of `fd`.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn push(&mut self, fd: impl AsFd) -> io::Result<FdNumber> {
        let number = u32::try_from(self.fds.len()).map_err(io::Error::other)?;
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

    /// In the order of their numbers.
    pub fn as_slice(&self) -> &[OwnedFd] {
        &self.fds
    }
}

impl Incoming {
    /// Numbers `fds` from 0.
    #[must_use]
    pub fn counted(fds: Vec<OwnedFd>) -> Self {
        Self { fds: (0..).zip(fds).collect() }
    }

    /// Descriptors with numbers of their own.
    #[must_use]
    pub fn numbered(fds: HashMap<u32, OwnedFd>) -> Self {
        Self { fds }
    }

    /// Takes a descriptor.
    ///
    /// # Errors
    /// There is none with this number (any more).
    pub fn take(&mut self, number: FdNumber) -> Result<OwnedFd, DescriptorError> {
        self.fds.remove(&number.0).ok_or(DescriptorError(number.0))
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

    use super::*;

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
