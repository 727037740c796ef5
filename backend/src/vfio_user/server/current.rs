//! The front-end that is served, and what it must do by when.

use std::time::{Duration, Instant};

use crate::vfio_user::connection::Connection;
use crate::vfio_user::error::Error;
use crate::vfio_user::session::Session;

/// Time-out for a front-end to negotiate a version, which QEMU does as soon as it has connected.
pub(super) const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// The front-end that is served.
pub(super) struct Current<'d> {
    pub(super) connection: Connection,
    pub(super) session: Session<'d>,
    /// When it must have negotiated a version; `None` if nobody else can connect.
    pub(super) version_by: Option<Instant>,
}

impl Current<'_> {
    /// When its connection is closed unless it does what is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let version = self.version_by.filter(|_| !self.session.is_negotiated());
        self.connection.deadline().into_iter().chain(version).min()
    }

    /// # Errors
    /// What it has not done by its deadline.
    pub(super) fn check_deadline(&self, now: Instant) -> Result<(), Error> {
        match self.version_by {
            Some(by) if by <= now && !self.session.is_negotiated() => Err(Error::Silent(VERSION_TIMEOUT)),
            _ => self.connection.check_deadline(now),
        }
    }
}
