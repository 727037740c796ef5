//! The ends of commands that only zoned disks have: reports, appends, and what is asked before a write goes on.

use super::bounce::Piece;
use super::inflight::InflightRequest;
use super::{BOUNCED, DataPath};
use crate::addr::Span;
use crate::driver::{Completion, Outcome};
use crate::engine::guest_memory::Slot;
use crate::engine::request::{Data, Disk, Operation, zones};
use crate::engine::statistics::Counters;

impl DataPath {
    /// Handles a completion of such a command. `piece` is what its bounce slot was used for, if it has one.
    #[cold]
    pub(super) fn complete_on_zones(&mut self, index: u32, piece: Option<Piece>, completion: Completion) {
        let Completion { tag, mut outcome, result } = completion;
        let Some((request, data)) = self.inflight.get(index) else { return };
        let is_report = request.unsure || request.operation == Operation::ZoneReport;
        let transferred = piece.filter(|_| outcome == Outcome::Success && is_report);
        let report = transferred.map(|piece| {
            let slot = tag & !BOUNCED;
            self.caches.slot(&self.bounce, slot, piece.bytes);
            copy(&self.bounce.slot(slot, piece.bytes))
        });
        if std::mem::take(&mut request.unsure) {
            request.outstanding -= 1;
            learn(&self.disk, request, &report.unwrap_or_default());
        } else {
            match (request.operation, report) {
                (Operation::ZoneReport, Some(report)) => {
                    request.bytes = self.guest.scatter(&data.buffers, &zones::reply(&self.disk, &report)) as u64;
                }
                (Operation::ZoneAppend, _) if outcome == Outcome::Success => {
                    match zones::append_reply(&self.disk, request.block, result, request.bytes) {
                        Some(reply) => _ = self.guest.scatter(&data.append_sector, &reply),
                        None => outcome = Outcome::Failed,
                    }
                }
                _ => {}
            }
            request.complete_command(outcome);
        }
        if request.is_complete() { self.finish(index) } else { self.resubmit.push(index) }
    }
}

fn copy(slot: &Slot<'_>) -> Vec<u8> {
    let mut bytes = vec![0; slot.len];
    slot.shared.copy_to(slot.offset, &mut bytes);
    bytes
}

/// Learns from a report of its zone how much of a write has been executed. Nothing but this write can have moved the write
/// pointer across its blocks. A full zone does not tell, and neither does a report that failed: then the device decides.
fn learn(disk: &Disk, request: &mut InflightRequest, report: &[u8]) {
    if let Some(pointer) = zones::write_pointer(report) {
        let executed = pointer.saturating_sub(request.block).min(request.bytes >> disk.block_shift());
        request.executed_up_to(executed << disk.block_shift());
    }
}

/// Counts a finished request of which `moved` bytes were transferred.
#[cold]
pub(super) fn count(counters: &Counters, operation: Operation, moved: u64) {
    if operation == Operation::ZoneAppend {
        counters.writes.add(1);
        counters.bytes_written.add(moved);
    } else {
        counters.zones.add(1);
    }
}

/// The bytes that a finished request, of which `moved` were transferred, has written to the chain before the status.
#[cold]
pub(super) fn written(operation: Operation, moved: u64, data: &Data) -> u64 {
    match operation {
        Operation::ZoneAppend if moved != 0 => data.append_sector.iter().map(Span::len).sum(),
        Operation::ZoneReport => moved,
        _ => 0,
    }
}
