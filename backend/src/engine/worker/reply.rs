//! Replies to commands.

use std::sync::Arc;

use crate::addr::{Gpa, Span};
use crate::engine::suspension::Suspension;
use crate::sync::mpsc::Sender;

/// A reply that is due when some request or command in flight has completed.
pub(super) enum PendingReply {
    Stop(usize, Sender<Option<u32>>),
    Suspend(usize, Sender<Suspension>),
    RemoveMemory(Arc<[Span<Gpa>]>, Sender<()>),
    Flush(Sender<bool>),
    Pause(Sender<()>),
    Hold(Sender<()>),
}

/// Replies to a command. A failed send means that the control thread has stopped waiting.
pub(super) fn reply<T>(answer: &Sender<T>, value: T) {
    let _ = answer.send(value);
}
