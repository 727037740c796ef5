//! Hands a running session over to another process of this program, so that the program can be updated under a running virtual
//! machine. The front-end notices nothing: its requests wait in the rings, and its messages in the socket.
//!
//! ```text
//!  predecessor                                            successor
//!                                    ◀──── HELLO          what it would serve
//!  compare; REFUSED, or:
//!  drain, stop rings, quiesce
//!  SESSION, DESCRIPTORS              ────▶                 restore: memory, session, controller
//!                                    ◀──── READY          no ring started, no message read
//!  GO                                ────▶
//!                                    ◀──── TAKEN          the moment of the change
//!  exit                                                   start rings, serve
//! ```
//!
//! The successor owns the session once TAKEN is in the predecessor's socket. The predecessor decides otherwise by shutting that
//! socket, after which no TAKEN can be sent: the kernel orders the two, so there is exactly one owner. Then it ends the
//! successor, which has descriptors of the device, and goes on.
//!
//! | file | contents |
//! |---|---|
//! | `description.rs` | the session as text, with numbers in place of descriptors |
//! | `descriptors.rs` | the descriptors, by these numbers |
//! | `memory_file.rs` | the text in a file in memory |
//! | `message.rs`, `link.rs` | the messages, and the socket |
//! | `terms.rs` | what both processes must agree on |
//! | `predecessor.rs`, `successor.rs` | the order of the steps on both sides, without any I/O |
//! | `process.rs` | the successor as a process: who it is, and its end |
//! | `listener.rs`, `spawn.rs`, `applicants.rs` | who asks to be the successor |

mod applicants;
mod description;
mod descriptors;
mod link;
mod listener;
mod memory_file;
mod message;
mod predecessor;
mod process;
mod spawn;
mod successor;
mod terms;

pub use applicants::{Applicants, Predecessor};
pub use description::{
    Description, DeviceState, FdNumber, FrontEnd, FunctionState, InflightState, Kick, ListenerState, LogState,
    RegionState, RingState, ShimState,
};
pub use descriptors::{DescriptorError, FdKey, Incoming, Outgoing};
pub use link::{Link, LinkError};
pub use predecessor::{Outcome, Owner, Successor, hand_over};
pub use process::SuccessorProcess;
pub(crate) use spawn::start_here;
pub use spawn::{StartFn, start_by};
pub use successor::{NotTaken, Offered, Restored, apply};
pub use terms::Terms;
