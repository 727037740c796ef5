//! One I/O queue pair: a worker's private path to the controller.
//!
//! Everything a command needs is allocated with the queue: a slot, which holds the caller's tag, and one list page per slot
//! (for PRPs, an SGL, or ranges). So submission allocates nothing, and completion finds the slot by the command identifier.
//!
//! ```text
//! slot:   free --submit--> busy --completion with its CID--> free
//! memory: submission ring | completion ring | list page of slot 0 | list page of slot 1 | ...
//! ```
//!
//! Between `submit` and `ring` the new entries and their list pages are in memory, but the controller does not know of them
//! yet. The device is not trusted: a completion counts only if its command identifier is that of a busy slot. Identifiers
//! contain a generation, so a duplicate completion does not complete the next command of the slot.

mod free_slots;
mod setup;
mod slot;

use std::os::fd::BorrowedFd;

pub use super::interrupts::QueueInterrupt;
use super::prp::{self, Limits};
use super::regs::PAGE_LEN;
use super::rings::{CompletionRing, SubmissionRing, completion_bytes, lists_at, slots, submission_bytes};
pub use super::rings::{Doorbells, QueueMemory, completions_at, memory_needed};
use super::sgl::{self, Granularity};
use super::spec::{
    CompletionEntry, DEALLOCATE, DEALLOCATE_ZEROED, DatasetRange, MAX_RANGES, SubmissionEntry, io_opcode,
};
use super::status::Status;
pub use super::tags::Tags;
use super::zones;
use crate::addr::{Iova, Span};
use crate::driver::{Blocks, Command, CommandId, Completion, Direction, Extent, Full, Outcome, OverdueCommands, Queue};
use crate::rate_limited_log::RateLimitedLog;
use free_slots::FreeSlots;
pub use setup::QueueSetup;
use slot::Slot;

/// Maximum entries of an I/O queue; fewer if the controller supports fewer.
pub const MAX_DEPTH: u16 = 256;
/// Low bits of a command identifier that are the slot index; the others count generations.
pub(super) const SLOT_BITS: u32 = 8;
const _: () = assert!(MAX_DEPTH == 1 << SLOT_BITS && SLOT_BITS == u8::BITS);

/// An I/O queue pair. On cache lines of its own, with all that one command writes: two, because x86 fetches lines in pairs.
#[repr(align(128))]
pub struct IoQueue {
    name: String,
    id: u16,
    submissions: SubmissionRing,
    completions: CompletionRing,
    /// The last one is never used: see [`slots`].
    slots: [Slot; MAX_DEPTH as usize],
    free: FreeSlots,
    /// Most commands in flight.
    most: usize,
    lists: QueueMemory,
    namespace: u32,
    disk: usize,
    limits: Limits,
    /// log2 of the bytes of a logical block.
    block_shift: u32,
    sgl: Option<Granularity>,
    interrupt: QueueInterrupt,
    /// Device addresses to which metadata are read and from which they are written; 0 without metadata.
    metadata: [Iova; 2],
    /// Identifier of slot 0, and what is added to that of a slot for each command.
    first_cid: u16,
    generation: u16,
    warnings: RateLimitedLog,
    /// Ticks so far, wrapping.
    ticks: u32,
}

impl IoQueue {
    /// Creates the driver's side. The controller's side is created by admin commands.
    ///
    /// # Panics
    /// If the depth or the longest transfer is out of range, or the memory is too small.
    #[must_use]
    pub fn new(setup: QueueSetup) -> Self {
        let QueueSetup { name, id, depth, memory, doorbells, namespace, disk, limits, sgl, interrupt, tags } = setup;
        let (first_cid, generation) = tags.numbering();
        assert!((2..=MAX_DEPTH).contains(&depth), "queue depth {depth}");
        assert!(limits.transfer <= prp::MAX_TRANSFER, "a transfer of {} bytes", limits.transfer);
        let slots = slots(depth);
        Self {
            submissions: SubmissionRing::new(&memory.slice(0, submission_bytes(depth)), id, depth, &doorbells),
            completions: CompletionRing::new(
                &memory.slice(completions_at(depth), completion_bytes(depth)),
                id,
                depth,
                &doorbells,
            ),
            slots: std::array::from_fn(|slot| {
                let slot = u16::try_from(slot).expect("at most MAX_DEPTH");
                Slot::free(first_cid + slot)
            }),
            free: FreeSlots::new(u8::try_from(slots).expect("below MAX_DEPTH")),
            most: slots.into(),
            lists: memory.slice(lists_at(depth), usize::from(slots) * PAGE_LEN),
            name,
            id,
            namespace,
            disk,
            limits,
            block_shift: limits.block.trailing_zeros(),
            sgl,
            interrupt,
            metadata: [Iova(0); 2],
            first_cid,
            generation,
            warnings: RateLimitedLog::new(module_path!()),
            ticks: 0,
        }
    }

    /// Reads metadata to `memory`, where nobody looks at them, and writes zeroes from its second half. Each half has room for
    /// the metadata of the longest transfer.
    #[must_use]
    pub fn with_metadata(self, memory: &QueueMemory) -> Self {
        let half = memory.memory.len() as u64 / 2;
        Self { metadata: [memory.iova, Iova(memory.iova.0 + half)], ..self }
    }

    #[cold]
    #[inline(never)]
    fn warn(&mut self, what: impl FnOnce() -> String) {
        let name = &self.name;
        self.warnings.warn(|| format!("{name}: {}", what()));
    }

    /// A Read or Write command (NVM Command Set 1.0 §3.2.4, §3.2.6), without its data pointer.
    #[inline]
    fn transfer(&self, direction: Direction, block: u64, count: u64) -> SubmissionEntry {
        let (opcode, metadata) = match direction {
            Direction::Read => (io_opcode::READ, self.metadata[0]),
            Direction::Write => (io_opcode::WRITE, self.metadata[1]),
        };
        SubmissionEntry { mptr: metadata.0, ..SubmissionEntry::on_blocks(opcode, block, count) }
    }

    /// [`Self::transfer`] with the number of bytes in the buffers, which must match: the device would access memory beyond them
    /// otherwise.
    #[inline]
    fn checked_transfer(&self, direction: Direction, block: u64, count: u32, bytes: u32) -> SubmissionEntry {
        assert!(
            bytes != 0 && u64::from(bytes) == u64::from(count) * u64::from(self.limits.block),
            "a command of {count} blocks with {bytes} bytes of buffer"
        );
        self.transfer(direction, block, count.into())
    }

    /// Offset and device address of the list page of `slot`.
    #[inline]
    fn list(&self, slot: u8) -> (usize, Iova) {
        let offset = usize::from(slot) * PAGE_LEN;
        (offset, Iova(self.lists.iova.0 + offset as u64))
    }

    /// Fills in the data pointer of the command of slot `index`: PRPs if they can describe the buffers, else an SGL.
    #[inline]
    fn set_data_pointer(
        &self,
        entry: &mut SubmissionEntry,
        index: u8,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u32,
    ) {
        let (at, list) = self.list(index);
        let page = &self.lists.memory;
        if self.sgl.is_some() && !prp::can_describe(buffers, position, bytes) {
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

    /// The slot for the next command.
    #[inline]
    fn free_slot(&self) -> Result<u8, Full> {
        self.free.top().filter(|_| !self.submissions.is_full()).ok_or(Full)
    }

    /// Writes `entry` to the ring as the command of slot `index`, which [`Self::free_slot`] returned.
    #[inline]
    fn enqueue(&mut self, index: u8, mut entry: SubmissionEntry, tag: u32) {
        self.free.pop();
        let slot = &mut self.slots[usize::from(index)];
        entry.cid = slot.cid();
        slot.take(tag, self.ticks);
        entry.nsid = self.namespace;
        self.submissions.push(&entry);
    }

    /// Checks a completion and frees its slot; `None` if it matches no command in flight.
    #[inline(always)]
    fn complete(&mut self, entry: CompletionEntry) -> Option<Completion> {
        let CompletionEntry { result, dw1, sq_head, sq_id, cid, status } = entry;
        if sq_id != self.id {
            self.warn(move || format!("dropped a completion for submission queue {sq_id}"));
            return None;
        }
        if !self.submissions.set_head(sq_head) {
            self.warn(move || format!("submission queue head {sq_head} is out of range"));
        }
        let [index, _] = cid.wrapping_sub(self.first_cid).to_le_bytes();
        let slot = &mut self.slots[usize::from(index)];
        if !slot.is_busy_with(cid) {
            self.warn(move || format!("dropped a completion for command {cid:#x}, which is not in flight"));
            return None;
        }
        slot.give_back(cid.wrapping_add(self.generation));
        let tag = slot.tag;
        self.free.push(index);
        let status = Status::from_word(status);
        let mut outcome = Outcome::Success;
        if !status.is_success() {
            self.warn(move || format!("command {cid:#x}: {status}"));
            outcome = status.outcome();
        }
        let result = u64::from(dw1) << 32 | u64::from(result);
        Some(Completion { tag, outcome, result })
    }

    /// Removes the finished commands and passes each to `done`.
    #[inline(always)]
    fn reap_each(&mut self, mut done: impl FnMut(Completion)) {
        let mut taken = 0;
        // Bounded: a controller that posts completions as fast as they are reaped must not keep the worker here.
        while taken < self.completions.size() {
            let Some(entry) = self.completions.pop() else {
                break;
            };
            taken += 1;
            if let Some(completion) = self.complete(entry) {
                done(completion);
            }
        }
        if taken != 0 {
            self.completions.update_head();
        }
    }
}

impl Queue for IoQueue {
    fn disk(&self) -> usize {
        self.disk
    }
    fn extent(&self, buffers: &[Span<Iova>], position: u64, bounce_limit: u32) -> Extent {
        let pages = prp::extent(buffers, position, self.limits, bounce_limit);
        let Some(granularity) = self.sgl else { return pages };
        if pages.direct && buffers.len() == 1 {
            return pages; // a contiguous buffer: an SGL cannot describe more
        }
        let bytes = sgl::max_bytes(buffers, position, self.limits, granularity);
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
        let index = self.free_slot()?;
        let mut entry = match command {
            Command::Read { block, count } => self.checked_transfer(Direction::Read, block, count, bytes),
            Command::Write { block, count } => self.checked_transfer(Direction::Write, block, count, bytes),
            Command::WriteZeroes { block, count, deallocate } => {
                let mut entry = SubmissionEntry::on_blocks(io_opcode::WRITE_ZEROES, block, count);
                entry.cdw12 |= if deallocate { DEALLOCATE_ZEROED } else { 0 };
                entry
            }
            Command::Flush => SubmissionEntry { opcode: io_opcode::FLUSH, ..SubmissionEntry::default() },
            Command::ZoneAppend { block, count } => {
                let write = self.checked_transfer(Direction::Write, block, count, bytes);
                SubmissionEntry { opcode: io_opcode::ZONE_APPEND, ..write }
            }
            Command::ZoneReport { block } => zones::report(block, bytes),
            Command::ManageZone { block, action } => zones::manage(block, action),
        };
        if bytes != 0 {
            self.set_data_pointer(&mut entry, index, buffers, position, bytes);
        }
        self.enqueue(index, entry, tag);
        Ok(())
    }

    fn submit_short(&mut self, direction: Direction, block: u64, buffer: Span<Iova>, tag: u32) -> bool {
        let whole_blocks = buffer.len() & u64::from(self.limits.block - 1) == 0;
        if !whole_blocks {
            return false;
        }
        let Some((prp1, prp2)) = prp::two_entries(buffer, self.limits.transfer) else { return false };
        let Ok(index) = self.free_slot() else { return false };
        let count = buffer.len() >> self.block_shift;
        self.enqueue(index, SubmissionEntry { prp1, prp2, ..self.transfer(direction, block, count) }, tag);
        true
    }

    /// Dataset Management, with the ranges in the slot's list page (one PRP).
    fn discard(&mut self, ranges: &[Blocks], tag: u32) -> Result<(), Full> {
        assert!((1..=usize::from(MAX_RANGES)).contains(&ranges.len()), "{} ranges in one command", ranges.len());
        let index = self.free_slot()?;
        let (at, list) = self.list(index);
        for (n, &Blocks { first, count }) in ranges.iter().enumerate() {
            let range = DatasetRange { attributes: 0, count, first };
            self.lists.memory.write(at + n * size_of::<DatasetRange>(), &range);
        }
        self.lists.flush(at, ranges.len() * size_of::<DatasetRange>());
        let entry = SubmissionEntry {
            opcode: io_opcode::DATASET_MANAGEMENT,
            prp1: list.0,
            cdw10: u32::try_from(ranges.len() - 1).expect("at most 255"),
            cdw11: DEALLOCATE,
            ..SubmissionEntry::default()
        };
        self.enqueue(index, entry, tag);
        Ok(())
    }

    fn ring(&mut self) {
        self.submissions.ring();
    }

    fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        self.reap_each(done);
    }

    fn reap_batch(&mut self, batch: &mut Vec<Completion>) -> usize {
        let most = usize::from(self.completions.size());
        if batch.len() < most {
            batch.resize(most, Completion { tag: 0, outcome: Outcome::Failed, result: 0 });
        }
        let (places, mut count) = (batch.as_mut_slice(), 0);
        self.reap_each(|completion| {
            places[count] = completion;
            count += 1;
        });
        count
    }

    fn tick(&mut self, limit: u32) -> OverdueCommands {
        self.interrupt.tick();
        self.ticks = self.ticks.wrapping_add(1);
        let mut found = OverdueCommands::default();
        for slot in self.slots.iter_mut().filter(|slot| slot.is_busy()) {
            // The tick interval of the submission was already running, so it does not count.
            let whole_ticks = self.ticks.wrapping_sub(slot.since_tick).saturating_sub(1);
            found.stalled |= whole_ticks >= 1;
            if slot.aborted {
                found.stuck |= whole_ticks >= (limit / 4).max(1);
            } else if whole_ticks >= limit {
                (slot.aborted, slot.since_tick) = (true, self.ticks);
                found.expired.push(CommandId { queue: self.id, command: slot.cid() });
            }
        }
        found
    }

    fn in_flight(&self) -> usize {
        self.most - self.free.len()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.interrupt.event()
    }

    fn is_polled(&self) -> bool {
        self.interrupt.is_polled()
    }

    fn set_interrupt_wanted(&self, interrupt_wanted: bool) {
        self.interrupt.set_wanted(interrupt_wanted);
    }
}

#[cfg(test)]
mod tests;
