//! Time-out and recovery of commands that do not complete: the watchdog detects them, and the supervisor aborts them or resets
//! the device for all workers.

mod hand_over;
mod overdue_reports;
mod requests;
mod supervisor;
mod watchdog;

pub(super) use overdue_reports::OverdueReports;
pub use requests::DeviceState;
pub(super) use supervisor::DeviceSupervisor;
pub use watchdog::WatchdogOptions;
pub(super) use watchdog::{CommandClock, Watchdog};
