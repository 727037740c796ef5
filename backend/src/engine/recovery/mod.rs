//! What happens when commands do not come back: the watchdog notices, the device supervisor acts on the device under all
//! workers.

mod overdue_reports;
mod supervisor;
mod watchdog;

pub(super) use overdue_reports::OverdueReports;
pub(super) use supervisor::DeviceSupervisor;
pub use watchdog::WatchdogOptions;
pub(super) use watchdog::{CommandClock, Watchdog};
