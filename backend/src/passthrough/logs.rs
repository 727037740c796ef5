//! The lines that a virtual machine causes. They are limited for all virtual machines together, because a front-end that
//! connects again and again is another one each time.

use crate::rate_limited_log::{Limit, SharedLog};

/// The logs of one function.
pub(super) struct Logs {
    /// Memory that is mapped and unmapped.
    pub(super) maps: SharedLog,
    /// What the virtual machine monitor is given, and is not.
    pub(super) grants: SharedLog,
    /// What has failed or is slow.
    pub(super) problems: SharedLog,
}

impl Logs {
    pub(super) const fn new() -> Self {
        let target = "vhost_device_vfio::passthrough";
        Self {
            maps: SharedLog::with_limit(target, Limit::MEMORY),
            grants: SharedLog::with_limit(target, Limit::CONNECTIONS),
            problems: SharedLog::new(target),
        }
    }
}
