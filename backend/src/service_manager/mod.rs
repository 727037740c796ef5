//! The service manager (systemd): it is told when this process is ready and when it stops, and it keeps the session of the
//! front-end while this process is restarted.
//!
//! ```text
//!  messages of the front-end ─▶ busy ─▶ … ─▶ the session is saved: descriptors to the store, text to a file that is there ─▶ idle
//!  SIGTERM                   ─▶ rings drained and stopped, saved with their positions ─▶ exit; the front-end stays connected
//!  the next process          ─▶ takes what was stored, and goes on
//! ```
//!
//! After a crash, the positions of the rings follow from the front-end's inflight regions. Without these, or if the crash came in
//! the midst of a message, the connection is closed: then the front-end connects again and sets everything up anew.
//!
//! The device is not stored. The kernel resets a function when the last process that has it open ends.

mod heartbeat;
mod notify;
mod saved;
mod state_file;
mod store;
mod stored;

pub use heartbeat::Heartbeat;
pub use notify::{main_pid, ready, status, stopping};
pub use saved::SavedSession;
pub use store::FdStore;
pub use stored::{Passed, Stored};
