//! The lines that a controller causes when it is brought up or reset. They are limited, because one that fails again and again
//! is reset again and again.

use crate::rate_limited_log::{Limit, SharedLog};

/// Bring-up, reset and shutdown.
pub(super) static RESETS: SharedLog = SharedLog::with_limit("vhost_device_vfio::driver::nvme", Limit::CONNECTIONS);
