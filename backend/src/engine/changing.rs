//! What of the disk may change while workers serve it; they read it, each time anew, without a lock.

use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::driver::Geometry;

/// What of the disk may change while it is served.
#[derive(Debug, Default)]
pub struct Changing {
    /// Size in logical blocks.
    pub blocks: AtomicU64,
    /// True while a flush is for the device: it has a volatile write cache, and it is on.
    pub cache_on: AtomicBool,
}

impl Changing {
    /// As `geometry` has it.
    #[must_use]
    pub fn of(geometry: &Geometry) -> Self {
        let cache_on = geometry.volatile_cache && geometry.cache_on;
        Self { blocks: geometry.blocks.into(), cache_on: cache_on.into() }
    }
}
