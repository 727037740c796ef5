//! What clients and server say to each other.

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
