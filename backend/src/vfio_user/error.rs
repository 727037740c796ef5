//! Why a message was refused, or a conversation ended.

use std::io;

use crate::coherency::Refusal;
use crate::kvm::RegistrationError;
use crate::passthrough::PassthroughError;

/// See the top of this file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A message's header cannot be right, so where the next one begins is not known.
    #[error("{0}")]
    Framing(String),
    /// The message came to no end, or its reply was not read.
    #[error("{0} for 5 s")]
    Stalled(&'static str),
    /// A message is not what its command says it is.
    #[error("{command}: {what}")]
    Malformed {
        /// The command's name.
        command: &'static str,
        /// What is wrong.
        what: String,
    },
    /// The capabilities of a `VERSION` message.
    #[error("VERSION: capabilities: {0}")]
    Capabilities(String),
    /// Another major version.
    #[error("VERSION: version {0}.{1} is not spoken here, only 0.x")]
    Version(u16, u16),
    /// The conversation has to begin with `VERSION`.
    #[error("{0} before VERSION")]
    TooEarly(&'static str),
    /// Not a command of this server.
    #[error("command {0} is not offered")]
    NotOffered(u16),
    /// The verdict on the function's DMA.
    #[error("{0}: {1}")]
    Refused(String, Refusal),
    /// The shim.
    #[error(transparent)]
    RegistrationError(#[from] RegistrationError),
    /// What the function, or its memory, would not do.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// A system call of ours.
    #[error("{what}: {source}")]
    System {
        /// Which.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl Error {
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }

    /// True if the conversation cannot go on after it.
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
        )
    }

    /// What the reply carries (errno(3)).
    pub(super) fn errno(&self) -> u32 {
        let errno = match self {
            Self::Framing(_) | Self::Malformed { .. } | Self::Capabilities(_) | Self::TooEarly(_) => libc::EINVAL,
            Self::Version(..) | Self::NotOffered(_) => libc::ENOTSUP,
            Self::Stalled(_) => libc::ETIMEDOUT,
            Self::Refused(..) | Self::RegistrationError(_) => libc::EPERM,
            Self::Passthrough(error) => error.errno(),
            Self::System { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
        };
        errno.unsigned_abs()
    }
}
