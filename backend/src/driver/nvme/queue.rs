//! One I/O queue pair: a worker's private path to the controller.
//!
//! Everything a command needs was set aside when the queue was made: a slot per command identifier, holding the caller's
//! tag, and with it one list page (for PRPs, an SGL, or ranges). So submitting allocates nothing and completing searches nothing.
//!
//! ```text
//! slot:   free --submit--> busy --completion with its identifier--> free
//! memory: submission ring | completion ring | list page of slot 0 | list page of slot 1 | ...
//! ```
//!
//! Between `submit` and `ring` the new entries, and the list pages of the slots named in them, are written but not yet
//! announced. The completion ring is written by the device, and the device is not trusted: a completion counts only if
//! it carries the identifier of a busy slot. Identifiers carry a generation, so a completion that comes twice does not
//! finish the slot's next command.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::prp::{self, Limits};
use super::regs::PAGE_LEN;
use super::rings::{CompletionRing, SubmissionRing, completion_bytes, submission_bytes};
pub use super::rings::{Doorbells, Shared};
use super::sgl::{self, Granularity};
use super::spec::{
    CompletionEntry, DEALLOCATE, DEALLOCATE_ZEROED, DatasetRange, MAX_RANGES, SubmissionEntry, io_opcode,
};
use super::status::Status;
use crate::addr::{Iova, Span};
use crate::driver::{Blocks, Command, CommandId, Completion, Extent, Full, OverdueCommands, Queue};
use crate::rate_limited_log::RateLimitedLog;

/// Entries of an I/O queue where the controller allows as many.
pub const MAX_DEPTH: u16 = 256;
/// Bits of a command identifier that name the slot; the rest counts generations.
const SLOT_BITS: u32 = 8;
const SLOT_MASK: u16 = MAX_DEPTH - 1;
const _: () = assert!(MAX_DEPTH == 1 << SLOT_BITS);

/// What a queue is made of.
pub struct QueueSetup {
    /// Who the log is about, such as `0000:00:04.0 queue 1`.
    pub name: String,
    /// Queue identifier, the same for both rings; 1 is the first.
    pub id: u16,
    /// Entries in each ring: 2 to [`MAX_DEPTH`].
    pub depth: u16,
    /// Zeroed memory, [`memory_needed`] bytes.
    pub memory: Shared,
    /// Where the rings are announced.
    pub doorbells: Doorbells,
    /// The namespace all commands go to.
    pub namespace: u32,
    /// What one command can carry.
    pub limits: Limits,
    /// What SGLs can name, if the controller knows them.
    pub sgl: Option<Granularity>,
    /// Signalled by the vector that the completion ring was given.
    pub event: OwnedFd,
    /// Whether somebody waits for it; see [`Function::interrupt_wanted`](crate::hardware::Function::interrupt_wanted).
    pub interrupt_wanted: Option<Arc<AtomicBool>>,
}

/// Bytes of memory that a queue of `depth` entries needs.
#[must_use]
pub fn memory_needed(depth: u16) -> usize {
    lists_at(depth) + usize::from(slots(depth)) * PAGE_LEN
}

/// Where the completion ring begins, bytes into the queue's memory; the submission ring is at 0.
#[must_use]
pub fn completions_at(depth: u16) -> usize {
    submission_bytes(depth)
}

fn lists_at(depth: u16) -> usize {
    submission_bytes(depth) + completion_bytes(depth)
}

/// Commands in flight at most: one entry of a ring stays unused. So slot 255 does not exist, and no identifier is FFFFh,
/// which means "none" (NVMe 2.0 §3.3.3.1).
fn slots(depth: u16) -> u16 {
    depth - 1
}

#[derive(Clone, Copy)]
struct Slot {
    /// Identifier of the command in the slot, or of the next one.
    cid: u16,
    busy: bool,
    tag: u32,
    /// The beat in which it was submitted, or its Abort was.
    since: u32,
    aborted: bool,
}

/// One I/O queue pair.
pub struct IoQueue {
    name: String,
    id: u16,
    submissions: SubmissionRing,
    completions: CompletionRing,
    slots: Box<[Slot]>,
    /// Free slots; the one used last comes first, while its list page is warm.
    free: Vec<u16>,
    lists: Shared,
    namespace: u32,
    limits: Limits,
    sgl: Option<Granularity>,
    event: OwnedFd,
    interrupt_wanted: Option<Arc<AtomicBool>>,
    complaints: RateLimitedLog,
    /// Beats so far.
    beats: u32,
}

impl IoQueue {
    /// The driver's half; the controller's was made by Create I/O Completion Queue and Create I/O Submission Queue.
    ///
    /// # Panics
    /// If the depth is out of range or the memory too small.
    #[must_use]
    pub fn new(setup: QueueSetup) -> Self {
        let QueueSetup { name, id, depth, memory, doorbells, namespace, limits, sgl, event, interrupt_wanted } = setup;
        assert!((2..=MAX_DEPTH).contains(&depth), "queue depth {depth}");
        assert!(limits.transfer <= prp::MAX_LISTED, "a transfer of {} bytes", limits.transfer);
        let slots = slots(depth);
        Self {
            submissions: SubmissionRing::new(&memory.part(0, submission_bytes(depth)), id, depth, &doorbells),
            completions: CompletionRing::new(
                &memory.part(completions_at(depth), completion_bytes(depth)),
                id,
                depth,
                &doorbells,
            ),
            slots: (0..slots).map(|slot| Slot { cid: slot, busy: false, tag: 0, since: 0, aborted: false }).collect(),
            free: (0..slots).rev().collect(),
            lists: memory.part(lists_at(depth), usize::from(slots) * PAGE_LEN),
            name,
            id,
            namespace,
            limits,
            sgl,
            event,
            interrupt_wanted,
            complaints: RateLimitedLog::of(module_path!()),
            beats: 0,
        }
    }

    #[cold]
    #[inline(never)]
    fn complain(&mut self, what: impl FnOnce() -> String) {
        let name = &self.name;
        self.complaints.warn(|| format!("{name}: {}", what()));
    }

    /// Opcode, first block and number of blocks, 0's based (NVM Command Set 1.0 §3.2.4, §3.2.6).
    ///
    /// A transfer whose length differs from what its PRPs name would go to memory that nobody named.
    #[inline]
    fn transfer(&self, opcode: u8, block: u64, count: u32, bytes: u32) -> SubmissionEntry {
        assert!(
            bytes != 0 && u64::from(bytes) == u64::from(count) * u64::from(self.limits.block),
            "a command of {count} blocks with {bytes} bytes of buffer"
        );
        Self::range(opcode, block, count)
    }

    /// The same without data.
    #[inline]
    fn range(opcode: u8, block: u64, count: u32) -> SubmissionEntry {
        let blocks = u16::try_from(count - 1).expect("no command is for more than 65536 blocks");
        let (low, high) = (block & 0xffff_ffff, block >> 32);
        SubmissionEntry {
            opcode,
            cdw10: u32::try_from(low).expect("masked"),
            cdw11: u32::try_from(high).expect("shifted"),
            cdw12: u32::from(blocks),
            ..SubmissionEntry::default()
        }
    }

    /// The list page of `slot`.
    #[inline]
    fn list(&self, slot: u16) -> (usize, Iova) {
        let offset = usize::from(slot) * PAGE_LEN;
        (offset, Iova(self.lists.iova.0 + offset as u64))
    }

    /// Fills in the data pointer of the command of slot `index`: PRPs where they can name the buffers, else an SGL.
    #[inline]
    fn name_data(&self, entry: &mut SubmissionEntry, index: u16, buffers: &[Span<Iova>], position: u64, bytes: u32) {
        let (at, list) = self.list(index);
        let page = &self.lists.shared;
        if self.sgl.is_some() && !prp::fit(buffers, position, bytes) {
            let ([low, high], count) = sgl::build(buffers, position, bytes, list, |i, words| {
                page.write_u64(at + i * 16, words[0]);
                page.write_u64(at + i * 16 + 8, words[1]);
            });
            (entry.prp1, entry.prp2) = (low, high);
            entry.flags = sgl::PSDT;
            if count != 0 {
                self.lists.flush(at, count * 16);
            }
            return;
        }
        let mut listed = 0;
        (entry.prp1, entry.prp2) = prp::build(buffers, position, bytes, list, |i, entry| {
            page.write_u64(at + i as usize * 8, entry);
            listed = (i as usize + 1) * 8;
        });
        if listed != 0 {
            self.lists.flush(at, listed);
        }
    }

    /// The slot of the next command, if there is room for one.
    #[inline]
    fn vacant(&self) -> Result<u16, Full> {
        self.free.last().copied().filter(|_| !self.submissions.is_full()).ok_or(Full)
    }

    /// Puts `entry` into the ring as the command of slot `index`, the one that [`Self::vacant`] has shown.
    #[inline]
    fn push(&mut self, index: u16, mut entry: SubmissionEntry, tag: u32) {
        self.free.pop();
        let slot = &mut self.slots[usize::from(index)];
        slot.busy = true;
        slot.tag = tag;
        slot.since = self.beats;
        slot.aborted = false;
        entry.cid = slot.cid;
        entry.nsid = self.namespace;
        self.submissions.push(&entry);
    }

    /// Checks one completion and frees its slot; `None` if it is none of ours.
    #[inline]
    fn retire(&mut self, entry: &CompletionEntry) -> Option<Completion> {
        if entry.sq_id != self.id {
            self.complain(|| format!("dropped a completion for submission queue {}", entry.sq_id));
            return None;
        }
        if !self.submissions.consumed_to(entry.sq_head) {
            self.complain(|| format!("submission queue head {} is out of range", entry.sq_head));
        }
        let index = entry.cid & SLOT_MASK;
        let Some(slot) = self.slots.get_mut(usize::from(index)).filter(|slot| slot.busy && slot.cid == entry.cid)
        else {
            self.complain(|| format!("dropped a completion for command {:#x}, which is not in flight", entry.cid));
            return None;
        };
        slot.busy = false;
        slot.cid = slot.cid.wrapping_add(1 << SLOT_BITS);
        let tag = slot.tag;
        self.free.push(index);
        let status = Status::from_word(entry.status);
        if !status.is_success() {
            self.complain(|| format!("command {:#x}: {status}", entry.cid));
        }
        Some(Completion { tag, outcome: status.outcome() })
    }
}

impl Queue for IoQueue {
    fn extent(&self, buffers: &[Span<Iova>], position: u64, bounce_limit: u32) -> Extent {
        let pages = prp::extent(buffers, position, self.limits, bounce_limit);
        let Some(granularity) = self.sgl else { return pages };
        if pages.direct && buffers.len() == 1 {
            return pages; // all of it, or as much as a command can carry
        }
        let bytes = sgl::reach(buffers, position, self.limits, granularity);
        let by_pages = if pages.direct { pages.bytes } else { 0 };
        if bytes > by_pages { Extent { bytes, direct: true, listed: true } } else { pages }
    }

    fn submit(
        &mut self,
        command: Command,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u32,
        tag: u32,
    ) -> Result<(), Full> {
        let index = self.vacant()?;
        let mut entry = match command {
            Command::Read { block, count } => self.transfer(io_opcode::READ, block, count, bytes),
            Command::Write { block, count } => self.transfer(io_opcode::WRITE, block, count, bytes),
            Command::WriteZeroes { block, count, deallocate } => {
                let mut entry = Self::range(io_opcode::WRITE_ZEROES, block, count);
                entry.cdw12 |= if deallocate { DEALLOCATE_ZEROED } else { 0 };
                entry
            }
            Command::Flush => SubmissionEntry { opcode: io_opcode::FLUSH, ..SubmissionEntry::default() },
        };
        if bytes != 0 {
            self.name_data(&mut entry, index, buffers, position, bytes);
        }
        self.push(index, entry, tag);
        Ok(())
    }

    /// Dataset Management with the ranges in the slot's list page, which is one PRP.
    fn discard(&mut self, ranges: &[Blocks], tag: u32) -> Result<(), Full> {
        assert!((1..=usize::from(MAX_RANGES)).contains(&ranges.len()), "{} ranges in one command", ranges.len());
        let index = self.vacant()?;
        let (at, list) = self.list(index);
        for (n, &Blocks { first, count }) in ranges.iter().enumerate() {
            let range = DatasetRange { attributes: 0, count, first };
            self.lists.shared.write(at + n * size_of::<DatasetRange>(), &range);
        }
        self.lists.flush(at, ranges.len() * size_of::<DatasetRange>());
        let entry = SubmissionEntry {
            opcode: io_opcode::DATASET_MANAGEMENT,
            prp1: list.0,
            cdw10: u32::try_from(ranges.len() - 1).expect("at most 255"),
            cdw11: DEALLOCATE,
            ..SubmissionEntry::default()
        };
        self.push(index, entry, tag);
        Ok(())
    }

    fn ring(&mut self) {
        self.submissions.ring();
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        let mut taken = 0;
        // A controller that writes entries as fast as they are taken would otherwise keep the worker here.
        while taken < self.completions.size() {
            let Some(entry) = self.completions.take() else {
                break;
            };
            taken += 1;
            if let Some(completion) = self.retire(&entry) {
                done(completion);
            }
        }
        if taken != 0 {
            self.completions.release();
        }
    }

    fn tick(&mut self, limit: u32) -> OverdueCommands {
        self.beats = self.beats.wrapping_add(1);
        let mut found = OverdueCommands::default();
        for slot in self.slots.iter_mut().filter(|slot| slot.busy) {
            // The beat in which it was submitted had begun before.
            let whole_beats = self.beats.wrapping_sub(slot.since).saturating_sub(1);
            found.stalled |= whole_beats >= 1;
            if slot.aborted {
                found.stuck |= whole_beats >= (limit / 4).max(1);
            } else if whole_beats >= limit {
                (slot.aborted, slot.since) = (true, self.beats);
                found.expired.push(CommandId { queue: self.id, command: slot.cid });
            }
        }
        found
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn set_interrupt_wanted(&self, interrupt_wanted: bool) {
        if let Some(flag) = &self.interrupt_wanted {
            // Before the last look at the completion ring.
            flag.store(interrupt_wanted, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests;
