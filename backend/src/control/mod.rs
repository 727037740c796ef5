//! The control socket: an operator sees what the process does, and changes its mind at run time. `vhost-device-vfio ctl` is its
//! client.
//!
//! Requests and replies are JSON objects, one a line, of at most 4096 bytes each way to the server. `version` is 1. It changes if
//! a name is removed or changes its meaning; names may be added without a change. `id`, if there is one, comes back.
//!
//! ```text
//!  {"version":1,"id":7,"command":"status"}             ─▶ {"version":1,"id":7,"result":{…}}
//!  {"version":1,"command":"log-level","level":"debug"} ─▶ {"version":1,"result":{…}}
//!  {"version":1,"command":"smart"}                     ─▶ {"version":1,"error":"…"}
//! ```
//!
//! | command | arguments | does |
//! |---|---|---|
//! | `status` | | who is served, and whether the device works |
//! | `stats` | | counters by worker and virtqueue; times by operation if they are measured |
//! | `verdict` | | whether DMA is coherent, and the facts that decide it |
//! | `memory` | | what is mapped for the device, and what the front-end shares |
//! | `log-level` | `level` | changes it until the process ends |
//! | `latency` | `on` | measures how long requests take, or no longer |
//! | `drain` | `timeout_ms` | lets requests wait in their rings once those in flight are complete |
//! | `resume` | | takes requests again |
//! | `reset-device` | | resets the device; requests in flight are submitted again |
//! | `identify`, `smart` | | the device's model and health |
//! | `successor` | `kvm_socket`, `off` | lets a front-end wait while another is served, or no longer |
//! | `takeover` | | starts the installed program as successor, as SIGUSR2 does |
//!
//! A drain ends with the process: neither a successor nor a restart continues it.

mod answers;
mod command;
mod connection;
mod ctl;
mod dialogue;
mod subject;
mod top;

pub use command::{Command, VERSION};
pub use connection::CtlError;
pub use ctl::run;
pub use dialogue::Lines;
pub(crate) use subject::Snapshot;
pub use subject::{Hooks, PermitFn, Personality, Subject};
