//! The part of the disk's geometry that may change at run time. Workers read it without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::driver::Geometry;

/// See the top of this file.
#[derive(Debug, Default)]
pub struct LiveGeometry {
    /// Size in logical blocks.
    pub blocks: AtomicU64,
    /// True if the device has a volatile write cache and it is on, so that flushes must reach the device.
    pub cache_on: AtomicBool,
}

impl LiveGeometry {
    /// Copies the variable part of `geometry`.
    #[must_use]
    pub fn of(geometry: &Geometry) -> Self {
        let cache_on = geometry.volatile_cache && geometry.cache_on;
        Self { blocks: geometry.blocks.into(), cache_on: cache_on.into() }
    }
}
