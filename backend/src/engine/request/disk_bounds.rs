//! What reads and writes are checked against. The size of a disk can change, so it is read once for a batch of requests.

use super::types::{RequestFault, SECTOR_SHIFT, T_IN, T_OUT};
use crate::driver::Direction;

/// A disk as transfers are checked against it, see [`Disk::bounds`](super::Disk::bounds).
#[derive(Clone, Copy, Debug)]
pub struct DiskBounds {
    pub(super) sectors: u64,
    /// The bits of a number of bytes that are less than a logical block.
    pub(super) in_block: u32,
    /// log2 of the sectors of a logical block.
    pub(super) sector_shift: u32,
    /// True if a write needs no other checks than a read.
    pub(super) takes_writes: bool,
}

impl DiskBounds {
    /// The direction of a request of type `kind` with device-writable or device-readable data. `None` if it is not a read or
    /// write, is refused, or is a write to zones, which [`super::parse`] checks.
    #[inline]
    pub(in crate::engine) fn direction_of(&self, kind: u32, writable: bool) -> Option<Direction> {
        match (kind, writable) {
            (T_IN, true) => Some(Direction::Read),
            (T_OUT, false) if self.takes_writes => Some(Direction::Write),
            _ => None,
        }
    }

    /// The first block of a transfer. All of it must be on the disk.
    #[inline]
    pub(in crate::engine) fn block(&self, sector: u64, bytes: u64) -> Result<u64, RequestFault> {
        let Self { sectors, in_block, sector_shift, .. } = *self;
        // The bits that the shift loses are too high to matter for the alignment.
        if (bytes | sector << SECTOR_SHIFT) & u64::from(in_block) != 0 {
            return Err(RequestFault::Alignment { sector, bytes, block_size: in_block + 1 });
        }
        match sectors.checked_sub(sector) {
            Some(left) if bytes >> SECTOR_SHIFT <= left => Ok(sector >> sector_shift),
            _ => Err(RequestFault::Range { sector, bytes, sectors }),
        }
    }
}
