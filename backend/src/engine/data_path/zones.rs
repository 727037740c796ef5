//! The ends of the requests that only zoned disks have.

use super::inflight::InflightRequest;
use crate::addr::{Iova, Span};
use crate::driver::Outcome;
use crate::engine::guest_memory::{GuestMemoryView, Slot};
use crate::engine::request::{Disk, zones};

/// Writes the report that the device has transferred to `slot` to the guest's buffers. Returns its length in bytes.
#[cold]
pub(super) fn answer(guest: &GuestMemoryView, disk: &Disk, buffers: &[Span<Iova>], slot: &Slot<'_>) -> u64 {
    let mut report = vec![0; slot.len];
    slot.shared.copy_to(slot.offset, &mut report);
    guest.scatter(buffers, &zones::reply(disk, &report)) as u64
}

/// Learns from a report of its zone how much of a write has been executed. Nothing but this write can have moved the write pointer
/// across its blocks. A full zone does not tell, and neither does one before them: the device decides then.
#[cold]
pub(super) fn learn(disk: &Disk, request: &mut InflightRequest, slot: &Slot<'_>, outcome: Outcome) {
    let mut report = vec![0; slot.len];
    slot.shared.copy_to(slot.offset, &mut report);
    if outcome == Outcome::Success
        && let Some(pointer) = zones::write_pointer(&report)
    {
        let executed = pointer.saturating_sub(request.block).min(request.bytes >> disk.block_shift());
        request.executed_up_to(executed << disk.block_shift());
    }
}

/// Tells the guest where the device has placed an append, if that can be.
#[cold]
pub(super) fn appended(
    guest: &GuestMemoryView,
    disk: &Disk,
    request: &InflightRequest,
    append_sector: &[Span<Iova>],
    block: u64,
) -> Outcome {
    let Some(reply) = zones::append_reply(disk, request.block, block, request.bytes) else {
        return Outcome::Failed;
    };
    guest.scatter(append_sector, &reply);
    Outcome::Success
}

/// Bytes that a successful append has written to the chain before the status.
pub(super) fn append_written(append_sector: &[Span<Iova>]) -> u64 {
    append_sector.iter().map(Span::len).sum()
}
