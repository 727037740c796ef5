//! The lines that a front-end causes. They are limited for all front-ends together, because one that connects again and again
//! is another one each time.

use crate::rate_limited_log::{Limit, SharedLog};

/// The logs of one server.
pub(super) struct Logs {
    /// Messages that were refused.
    pub(super) refusals: SharedLog,
    /// Front-ends that are sent away, and that cannot be accepted.
    pub(super) rejections: SharedLog,
    /// Front-ends that come, negotiate and go.
    pub(super) connections: SharedLog,
    /// Memory that is mapped and unmapped.
    pub(super) memory: SharedLog,
}

impl Logs {
    pub(super) const fn new() -> Self {
        let target = "vhost_device_vfio::vhost_user";
        Self {
            refusals: SharedLog::with_limit(target, Limit::CONNECTIONS),
            rejections: SharedLog::new(target),
            connections: SharedLog::with_limit(target, Limit::CONNECTIONS),
            memory: SharedLog::with_limit(target, Limit::MEMORY),
        }
    }
}
