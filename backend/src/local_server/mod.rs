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
mod dialogue;
mod listener;
mod serve;

pub use dialogue::{Dialogue, Job, Step};
pub use listener::{LocalAddress, LocalListener, LocalSocketError};
pub use serve::{Admission, LocalServer};
