//! The zones of a disk, as requests are checked against them.

use crate::driver::{Geometry, ZoneGeometry};

/// The disk's zones, as requests are checked against them.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct DiskZones {
    /// Logical blocks of a zone.
    pub(super) blocks: u64,
    /// Longest append, bytes.
    pub(super) max_append: u32,
    /// Longest report that is requested from the device, bytes.
    pub(super) max_report: u32,
}

impl DiskZones {
    /// The zones of `geometry`, if it has any. A report and an append that PRPs cannot describe take a bounce buffer of
    /// `bounce` bytes.
    pub(super) fn of(geometry: &Geometry, bounce: u32) -> Option<Self> {
        let ZoneGeometry { blocks, .. } = geometry.zones?;
        let max_report = if geometry.max_transfer == 0 { bounce } else { bounce.min(geometry.max_transfer) };
        Some(Self { blocks, max_append: max_append(geometry, bounce), max_report })
    }

    /// The first block of the zone of `block`.
    pub(super) fn start(self, block: u64) -> u64 {
        block - block % self.blocks
    }

    /// True if blocks `first` to `first + count - 1` are in one zone.
    pub(super) fn in_one(self, first: u64, count: u64) -> bool {
        first % self.blocks + count <= self.blocks
    }
}

/// The longest append that is offered, bytes. An append cannot be split, so it must fit a bounce buffer of `bounce` bytes: the
/// guest's buffers may be such that no command can describe them.
#[must_use]
pub fn max_append(geometry: &Geometry, bounce: u32) -> u32 {
    geometry.zones.map_or(0, |zones| zones.max_append.min(bounce))
}
