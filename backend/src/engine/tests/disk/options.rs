//! What the fake disk is like.

use crate::driver::{DiscardLimits, Geometry, ZeroesLimits};

/// Options of the fake disk.
#[derive(Clone)]
pub(in crate::engine::tests) struct DiskOptions {
    pub(in crate::engine::tests) queues: usize,
    /// Disks, among which the queues are divided. They share one medium.
    pub(in crate::engine::tests) disks: usize,
    pub(in crate::engine::tests) depth: usize,
    pub(in crate::engine::tests) max_transfer: u32,
    /// Alignment of addresses and lengths that need no bouncing, bytes.
    pub(in crate::engine::tests) alignment: u64,
    pub(in crate::engine::tests) geometry: Geometry,
}

impl Default for DiskOptions {
    fn default() -> Self {
        let geometry = Geometry {
            blocks: 2048,
            block_size: 512,
            physical_block_size: 512,
            volatile_cache: true,
            cache_on: true,
            serial: "SERIAL".into(),
            model: "MODEL".into(),
            max_transfer: 128 << 10,
            discard: Some(DiscardLimits { ranges: 4, range_blocks: 64, blocks: 100 }),
            zeroes: Some(ZeroesLimits { blocks: 16, deallocates: true }),
            ..Geometry::default()
        };
        Self { queues: 1, disks: 1, depth: 64, max_transfer: 128 << 10, alignment: 4, geometry }
    }
}
