//! The checked form of a fast request: a transfer of one buffer.

use super::disk_bounds::DiskBounds;
use super::pending_used::PendingUsed;
use super::types::{Disk, Operation};
use crate::addr::{Gpa, Iova, Span};
use crate::driver::Direction;
use crate::engine::guest_memory::{BatchView, GuestMemoryView};
use crate::engine::virtqueue::FastRequest;
use crate::engine::virtqueue::chain::Head;

/// A read or write of one buffer, completely checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Read or write.
    pub operation: Operation,
    /// First logical block.
    pub block: u64,
    /// IOVAs of the data, whole blocks.
    pub data: Span<Iova>,
    /// Address of the status byte.
    pub status: Gpa,
}

impl Transfer {
    /// Checks `request`. `None` if it is not a valid read or write.
    #[inline]
    #[must_use]
    pub fn of(request: &FastRequest, guest: &mut GuestMemoryView, disk: &Disk) -> Option<Self> {
        Self::in_batch(request, &mut guest.batch()?, disk.bounds())
    }

    /// The same for one of several requests.
    #[inline(always)]
    #[must_use]
    pub fn in_batch(request: &FastRequest, guest: &mut BatchView<'_>, disk: DiskBounds) -> Option<Self> {
        let buffers = request.buffers();
        let (kind, sector) = guest.header_and_status(buffers.header, buffers.status)?;
        let operation = disk.direction_of(kind, buffers.writable)?.into();
        let data = guest.data(buffers.data, buffers.len)?;
        let block = disk.block(sector, data.len()).ok()?;
        Some(Self { operation, block, data, status: buffers.status })
    }

    /// True if one command for all of it would cross a boundary of the disk, or be longer than any command.
    #[inline]
    pub(in crate::engine) fn crosses_boundary(&self, disk: &Disk) -> bool {
        u32::try_from(self.data.len()).map_or(true, |bytes| disk.within_boundary(self.block, 0, bytes) != bytes)
    }

    /// Its direction.
    #[inline]
    pub(in crate::engine) fn direction(&self) -> Direction {
        if self.operation == Operation::Read { Direction::Read } else { Direction::Write }
    }

    /// The pending used entry of this transfer's chain.
    #[inline]
    pub fn pending_used(&self, head: Head) -> PendingUsed {
        PendingUsed::new(head, Some(self.status))
    }
}
