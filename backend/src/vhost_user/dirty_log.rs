//! The log of dirty pages as the front-end sets it up (vhost-user: "Migration"). The engine marks pages in it; `memory/dirty_log.rs`
//! has the format.
//!
//! | the front-end | and then |
//! |---|---|
//! | acknowledges `LOG_ALL`, and has not sent a log for these rings | rings wait for SET_LOG_BASE. QEMU sends it last when it starts a device |
//! | the same while rings run | refused |
//! | sends a log without room for all of its memory and used rings | refused |
//! | adds memory, or a used ring, without room in the log | refused |
//! | sends another log | it is in use before the reply |
//! | stops all rings | the log is dropped: the next start brings another |
//!
//! A front-end that does not wait for the reply to a refused message would rely on marks, so it is disconnected.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::addr::Gpa;
use crate::engine::DirtyLogging;
use crate::handover::{LogState, Outgoing};
use crate::memory::{DirtyLog, LOG_PAGE, SharedFileError};

/// Why pages cannot be marked as the front-end wants.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// LOG_ALL without LOG_SHMFD.
    #[error("SET_FEATURES acknowledges LOG_ALL, but LOG_SHMFD has not been negotiated, so there can be no log")]
    NoFile,
    /// LOG_ALL while rings run, and no log.
    #[error("SET_FEATURES acknowledges LOG_ALL while virtqueues run, and no SET_LOG_BASE has come")]
    NoLog,
    /// The log cannot be mapped.
    #[error("SET_LOG_BASE: {0}")]
    File(#[from] SharedFileError),
    /// The log ends too early.
    #[error("{what} reaches to {last}, which needs a log of {} bytes; SET_LOG_BASE was for {found}", last.0 / LOG_PAGE / 8 + 1)]
    TooSmall {
        /// What cannot be marked.
        what: String,
        /// Its last address.
        last: Gpa,
        /// Size of the log, bytes.
        found: u64,
    },
}

/// What the front-end has sent.
#[derive(Default)]
pub(super) struct LogSetup {
    /// SET_LOG_BASE.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// SET_LOG_FD.
    pub(super) event: Option<Arc<OwnedFd>>,
}

impl LogSetup {
    /// For another process.
    pub(super) fn describe(&self, outgoing: &mut Outgoing) -> io::Result<Option<LogState>> {
        let Some(log) = &self.log else { return Ok(None) };
        let (file, offset, size) = log.source();
        Ok(Some(LogState { file: outgoing.push(file)?, size, offset }))
    }

    pub(super) fn logging(&self) -> Option<DirtyLogging> {
        self.log.as_ref().map(|log| DirtyLogging::new(Arc::clone(log), self.event.clone()))
    }
}

/// Checks that `log` has room for the page of `last`. `what` ends there.
pub(super) fn check_room(log: &DirtyLog, what: impl FnOnce() -> String, last: Gpa) -> Result<(), LogError> {
    let (.., found) = log.source();
    if log.covers(last) { Ok(()) } else { Err(LogError::TooSmall { what: what(), last, found }) }
}
