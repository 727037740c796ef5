//! A request of the common shape, checked: the transfer of one buffer.

use super::pending_used::PendingUsed;
use super::types::{Disk, Operation};
use crate::addr::{Gpa, Iova, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::FastRequest;
use crate::engine::virtqueue::chain::Head;

/// A transfer of one buffer, everything about it checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Read or write.
    pub operation: Operation,
    /// First logical block.
    pub block: u64,
    /// The data, whole blocks, as the device names them.
    pub data: Span<Iova>,
    /// Where the status goes.
    pub status: Gpa,
}

impl Transfer {
    /// The transfer that `request` asks for, if it asks for one that can be done.
    #[inline]
    #[must_use]
    pub fn of(request: &FastRequest, guest: &mut GuestMemoryView, disk: &Disk) -> Option<Self> {
        let buffers = request.buffers();
        let (kind, sector) = guest.header(buffers.header)?;
        let operation = disk.transfer_of(kind, buffers.writable)?;
        if !guest.has_status(buffers.status) {
            return None;
        }
        let data = guest.data(buffers.data)?;
        let block = disk.block(sector, data.len()).ok()?;
        Some(Self { operation, block, data, status: buffers.status })
    }

    /// The obligation to return the chain that asked for it.
    #[inline]
    pub fn pending_used(&self, head: Head) -> PendingUsed {
        PendingUsed::new(head, Some(self.status))
    }
}
