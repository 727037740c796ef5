//! The part of the disk's geometry that may change while it is served. Workers read it without a lock each time they need it.

use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::driver::Geometry;

/// See the top of this file.
#[derive(Debug, Default)]
pub struct LiveGeometry {
    /// Size in logical blocks.
    pub blocks: AtomicU64,
    /// True while a flush is for the device: it has a volatile write cache, and it is on.
    pub cache_on: AtomicBool,
}

impl LiveGeometry {
    /// As `geometry` has it.
    #[must_use]
    pub fn of(geometry: &Geometry) -> Self {
        let cache_on = geometry.volatile_cache && geometry.cache_on;
        Self { blocks: geometry.blocks.into(), cache_on: cache_on.into() }
    }
}
