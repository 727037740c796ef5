//! The messages of a hand-over: one JSON object each, in one packet.

use serde::{Deserialize, Serialize};

use super::description::VERSION;
use super::terms::Terms;

/// Longest message, bytes.
pub(super) const MAX_BYTES: usize = 16 << 10;
/// Descriptors in one message; the kernel's limit is 253 (`SCM_MAX_FD`).
pub(super) const MAX_FDS: usize = 200;

/// See the diagram in `mod.rs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// Successor: what it would serve.
    Hello(Hello),
    /// Predecessor: it goes on, because of this.
    Refused(String),
    /// Predecessor: so many descriptors follow, in messages of their own. The first is the description.
    Session {
        /// How many.
        descriptors: usize,
    },
    /// Predecessor: some of the descriptors.
    Descriptors,
    /// Successor: it cannot serve the session, because of this.
    Failed(String),
    /// Successor: everything is restored, no ring runs, and no message has been read.
    Ready,
    /// Predecessor: take it.
    Go,
    /// Successor: it has taken it.
    Taken,
}

/// The first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// [`VERSION`].
    pub(super) version: u32,
    /// The release, for the log.
    pub(super) program: String,
    /// Its process id.
    pub(super) pid: u32,
    /// What it would serve.
    pub(super) terms: Terms,
}

impl Hello {
    pub(super) fn new(terms: Terms) -> Self {
        Self { version: VERSION, program: env!("CARGO_PKG_VERSION").to_owned(), pid: std::process::id(), terms }
    }
}

impl Message {
    /// Its name, for messages about it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "HELLO",
            Self::Refused(_) => "REFUSED",
            Self::Session { .. } => "SESSION",
            Self::Descriptors => "DESCRIPTORS",
            Self::Failed(_) => "FAILED",
            Self::Ready => "READY",
            Self::Go => "GO",
            Self::Taken => "TAKEN",
        }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it has no map with other keys than strings")
    }

    /// `Err` says what is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        // Another release may have other fields in its HELLO.
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum AnyHello {
            Hello { version: u32 },
        }
        if let Ok(AnyHello::Hello { version }) = serde_json::from_slice(bytes)
            && version != VERSION
        {
            return Err(format!("it speaks version {version} of the hand-over, this program version {VERSION}"));
        }
        serde_json::from_slice(bytes).map_err(|error| format!("no message of a hand-over: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_of_another_version_is_refused_whatever_else_it_has() {
        let error = Message::parse(br#"{"hello":{"version":7,"other":[]}}"#).unwrap_err();
        assert!(error.contains("version 7 of the hand-over, this program version 1"), "{error}");
    }

    #[test]
    fn garbage_is_refused() {
        for garbage in [&b""[..], b"\xff\xfe", b"{}", b"[1]", br#"{"hello":{}}"#, br#"{"descriptors":-1}"#, b"\"stop\""]
        {
            assert!(Message::parse(garbage).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn each_message_is_read_as_it_was_written() {
        let messages =
            [Message::Refused("no".into()), Message::Session { descriptors: 3 }, Message::Ready, Message::Taken];
        for message in messages {
            assert_eq!(Message::parse(&message.to_bytes()), Ok(message));
        }
    }
}
