//! A server for a few local clients, in one thread of its own. It is bounded in clients, bytes and time, so that no client can
//! harm the process that it looks into: not by what it sends, not by what it does not read, and not by coming in great numbers.
//!
//! ```text
//!  client ─▶ bytes ─▶ Dialogue::step ─▶ reply ─▶ written as the client reads it ─▶ the next request, or the end
//!                            └─▶ a job, in a thread beside ─▶ reply
//! ```
//!
//! What the bytes mean is the dialogue's: `control/` speaks lines of JSON, `metrics/` HTTP.

mod client;
mod listener;
mod serve;

pub use listener::{LocalAddress, LocalListener, LocalSocketError};
pub use serve::{Admission, LocalServer};

/// A reply that takes its time, computed in a thread of its own. There is one such thread.
pub type Job = Box<dyn FnOnce() -> Vec<u8> + Send>;

/// What follows from the bytes that a client has sent so far.
pub enum Step {
    /// They are no whole request yet.
    Incomplete,
    /// The reply to the request, which has been removed from the bytes.
    Reply(Vec<u8>),
    /// As [`Self::Reply`], and the connection ends after it.
    Last(Vec<u8>),
    /// The reply takes its time. The request has been removed from the bytes.
    Later(Job),
}

/// What clients and server say to each other.
pub trait Dialogue: Send {
    /// Most bytes of a request.
    const MOST_BYTES: usize;

    /// Handles the first request in `input`, if it is there as a whole.
    fn step(&mut self, input: &mut Vec<u8>) -> Step;
    /// The last reply to a client whose request has more than [`Self::MOST_BYTES`].
    fn too_long(&self) -> Vec<u8>;
    /// The reply to a request that must wait for another job.
    fn busy(&self) -> Vec<u8>;
    /// The last and only reply to a client that is one too many, or that may not ask: `reason` says which.
    fn refused(&self, reason: &str) -> Vec<u8>;
}
