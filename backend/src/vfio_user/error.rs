//! Why a message was refused, or a connection was closed.

use std::io;
use std::time::Duration;

use crate::coherency::Refusal;
use crate::foreign_fd::UnusableFds;
use crate::kvm::RegistrationError;
use crate::passthrough::PassthroughError;

/// See the top of this file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The header is invalid, so the start of the next message is unknown.
    #[error("{0}")]
    Framing(String),
    /// A message stayed incomplete, or a reply was not read.
    #[error("{0} for 5 s")]
    Stalled(&'static str),
    /// The payload is invalid for the command.
    #[error("{command}: {defect}")]
    Malformed {
        /// The command's name.
        command: &'static str,
        /// What is wrong with it.
        defect: String,
    },
    /// The capabilities of a `VERSION` message are invalid.
    #[error("VERSION: capabilities: {0}")]
    Capabilities(String),
    /// The client has another major version.
    #[error("VERSION: version {0}.{1} is not supported, only 0.x")]
    Version(u16, u16),
    /// The first message is not `VERSION`.
    #[error("{0} before VERSION")]
    TooEarly(&'static str),
    /// The command is unknown or not supported.
    #[error("command {0} is not supported")]
    NotSupported(u16),
    /// The verdict on the function's DMA is a refusal.
    #[error("{0}: {1}")]
    Refused(String, Refusal),
    /// Memory may not be mapped without a registration with the shim.
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    /// The descriptors of the message cannot be used.
    #[error("{command}: {unusable}")]
    Descriptors {
        /// The command's name.
        command: &'static str,
        /// Why.
        unusable: UnusableFds,
    },
    /// The function could not be assigned, several times.
    #[error("{0}; the function is not assigned after several attempts")]
    Unassignable(PassthroughError),
    /// No `VERSION` has come, or none that can be accepted.
    #[error("it has negotiated no version within {} s", .0.as_secs())]
    Silent(Duration),
    /// The operation on the function or its memory failed.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// A system call of the server failed.
    #[error("{step}: {source}")]
    System {
        /// The call.
        step: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl Error {
    pub(super) fn system<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { step, source: source.into() }
    }

    /// True if the connection must be closed.
    pub(super) fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::Framing(_)
                | Self::Stalled(_)
                | Self::System { .. }
                | Self::Capabilities(_)
                | Self::Version(..)
                | Self::TooEarly(_)
                | Self::Refused(..)
                | Self::Unassignable(_)
                | Self::Silent(_)
        )
    }

    /// The errno in the reply.
    pub(super) fn errno(&self) -> u32 {
        let errno = match self {
            Self::Framing(_) | Self::Malformed { .. } | Self::Capabilities(_) | Self::TooEarly(_) => libc::EINVAL,
            Self::Version(..) | Self::NotSupported(_) => libc::ENOTSUP,
            Self::Stalled(_) | Self::Silent(_) => libc::ETIMEDOUT,
            Self::Refused(..) | Self::Registration(_) => libc::EPERM,
            Self::Descriptors { unusable: UnusableFds::NoRoom, .. } => libc::EMFILE,
            Self::Descriptors { unusable: UnusableFds::Foreign(_), .. } => libc::EINVAL,
            Self::Passthrough(error) | Self::Unassignable(error) => error.errno(),
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        };
        errno.unsigned_abs()
    }
}
