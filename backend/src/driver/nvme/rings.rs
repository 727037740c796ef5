//! The two rings of a queue pair, in memory shared with the controller, and the doorbells that announce moves on them.
//!
//! ```text
//! submission:  driver writes entry at tail ... ring() -> tail doorbell;    head comes back in completions
//! completion:  controller writes entry with its phase bit flipped per lap; driver reads, release() -> head doorbell
//! ```
//!
//! Each ring has one owner, so all state here is plain; only the phase bit is read with acquire ordering, because the
//! rest of the entry stands behind it (NVMe 2.0 §3.3.1, §3.3.3.2).

use std::sync::Arc;

use super::regs::{PAGE_LEN, completion_doorbell, submission_doorbell};
use super::spec::{CompletionEntry, SubmissionEntry};
use crate::addr::Iova;
use crate::hardware::{CacheFlush, DmaBuffer, Registers};
use crate::sys::{SharedArray, SharedMemory};

/// A piece of memory that both sides see: where this process and where the device finds it. The mapping itself is kept
/// by the controller, which gives it up only when the device has stopped.
#[derive(Clone)]
pub struct Shared {
    /// This process's view.
    pub shared: SharedMemory,
    /// The device's address of its first byte.
    pub iova: Iova,
    /// What makes the two views agree, if they do not by themselves.
    pub caches: Option<Arc<dyn CacheFlush>>,
}

impl Shared {
    /// Both views of `buffer`, which must be kept until the device has stopped.
    #[must_use]
    pub fn of(buffer: &DmaBuffer, caches: Option<Arc<dyn CacheFlush>>) -> Self {
        Self { shared: buffer.memory().clone(), iova: buffer.span().start(), caches }
    }

    /// Makes both views agree on `len` bytes from `offset`: after writing and before the doorbell, or before reading.
    #[inline]
    pub(super) fn flush(&self, offset: usize, len: usize) {
        if self.caches.is_some() {
            self.flush_lines(offset, len);
        }
    }

    /// Apart, so that a coherent device pays for one comparison alone.
    #[inline(never)]
    fn flush_lines(&self, offset: usize, len: usize) {
        if let Some(caches) = &self.caches {
            caches.flush(&self.shared, offset, len);
        }
    }

    /// The first `count` entries of a ring; the driver has sized the memory for them.
    fn rows<const N: usize>(&self, count: u16) -> SharedArray<SharedMemory, u64, N> {
        self.shared.rows(0, count.into()).expect("a ring begins on a page of its own").keep()
    }

    /// `len` bytes from `offset`; the driver has sized the memory for what it keeps there.
    pub(super) fn part(&self, offset: usize, len: usize) -> Self {
        let shared = self.shared.slice(offset, len).expect("queue memory is sized for its parts");
        Self { shared, iova: Iova(self.iova.0 + offset as u64), caches: self.caches.clone() }
    }
}

/// The registers by which a queue is announced.
#[derive(Clone)]
pub struct Doorbells {
    /// The controller's registers, large enough for the queue's doorbells.
    pub registers: Arc<dyn Registers>,
    /// Bytes between two doorbells (CAP.DSTRD).
    pub stride: usize,
}

struct Doorbell {
    registers: Arc<dyn Registers>,
    offset: usize,
}

impl Doorbell {
    #[inline]
    fn write(&self, index: u16) {
        self.registers.write32(self.offset, u32::from(index));
    }
}

/// Bytes of memory for a submission ring of `entries`, in whole pages.
pub(super) fn submission_bytes(entries: u16) -> usize {
    (usize::from(entries) * size_of::<SubmissionEntry>()).next_multiple_of(PAGE_LEN)
}

/// Bytes of memory for a completion ring of `entries`, in whole pages.
pub(super) fn completion_bytes(entries: u16) -> usize {
    (usize::from(entries) * size_of::<CompletionEntry>()).next_multiple_of(PAGE_LEN)
}

/// Commands on their way to the controller.
pub(super) struct SubmissionRing {
    memory: Shared,
    entries: SharedArray<SharedMemory, u64, 8>,
    size: u16,
    /// Next entry the controller may not have read yet, as far as it said.
    head: u16,
    /// Next entry to write.
    tail: u16,
    /// What the doorbell says; entries from here to `tail` are known to this process alone.
    rung: u16,
    doorbell: Doorbell,
}

impl SubmissionRing {
    pub(super) fn new(memory: &Shared, queue: u16, size: u16, doorbells: &Doorbells) -> Self {
        let offset = submission_doorbell(queue, doorbells.stride);
        let doorbell = Doorbell { registers: Arc::clone(&doorbells.registers), offset };
        let entries = memory.rows(size);
        Self { memory: memory.clone(), entries, size, head: 0, tail: 0, rung: 0, doorbell }
    }

    #[inline]
    fn next(&self, index: u16) -> u16 {
        if index + 1 == self.size { 0 } else { index + 1 }
    }

    /// True if no entry can be written: one stays unused, to tell full from empty. NVMe 2.0 §3.3.1.5
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.next(self.tail) == self.head
    }

    /// Writes one entry; the controller learns of it by [`Self::ring`]. The ring must not be full.
    #[inline]
    pub(super) fn push(&mut self, entry: &SubmissionEntry) {
        debug_assert!(!self.is_full());
        self.entries.write(self.tail.into(), entry.words());
        self.tail = self.next(self.tail);
    }

    /// Makes the entries written since the last doorbell visible to a controller that does not snoop.
    #[inline]
    fn flush(&self) {
        let at = |index: u16| usize::from(index) * size_of::<SubmissionEntry>();
        let (from, to) = (at(self.rung), at(self.tail));
        if from < to {
            self.memory.flush(from, to - from);
        } else {
            self.memory.flush(from, at(self.size) - from);
            self.memory.flush(0, to);
        }
    }

    /// Announces what has been written; false if there was nothing new.
    #[inline]
    pub(super) fn ring(&mut self) -> bool {
        if self.rung == self.tail {
            return false;
        }
        self.flush();
        self.doorbell.write(self.tail);
        self.rung = self.tail;
        true
    }

    /// Takes note of how far the controller says it has read; false if that is beyond what it was told of.
    #[inline]
    pub(super) fn consumed_to(&mut self, head: u16) -> bool {
        let distance = |to: u16| if to >= self.head { to - self.head } else { self.size - self.head + to };
        let plausible = head < self.size && distance(head) <= distance(self.rung);
        if plausible {
            self.head = head;
        }
        plausible
    }
}

/// Completions on their way back.
pub(super) struct CompletionRing {
    memory: Shared,
    entries: SharedArray<SharedMemory, u64, 2>,
    size: u16,
    head: u16,
    /// The value of the phase bit that marks an entry of the current lap as new.
    phase: bool,
    doorbell: Doorbell,
}

impl CompletionRing {
    /// The memory must be zeroed: the first lap is marked by phase 1.
    pub(super) fn new(memory: &Shared, queue: u16, size: u16, doorbells: &Doorbells) -> Self {
        let offset = completion_doorbell(queue, doorbells.stride);
        let doorbell = Doorbell { registers: Arc::clone(&doorbells.registers), offset };
        let entries = memory.rows(size);
        Self { memory: memory.clone(), entries, size, head: 0, phase: true, doorbell }
    }

    /// How many entries there are, hence the most that one honest pass can find.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Takes the next completion, if the controller has written one.
    #[inline]
    pub(super) fn take(&mut self) -> Option<CompletionEntry> {
        let at = usize::from(self.head);
        // The controller may have written behind a cached line; this process never writes it, so the flush only drops it.
        self.memory.flush(at * size_of::<CompletionEntry>(), size_of::<CompletionEntry>());
        // Dwords 2 and 3 at once and first: the phase bit in the last is written last, and vouches for all.
        let entry = CompletionEntry::from_words(self.entries.read_acquire(at));
        if (entry.status & 1 == 1) != self.phase {
            return None;
        }
        self.head += 1;
        if self.head == self.size {
            self.head = 0;
            self.phase = !self.phase;
        }
        Some(entry)
    }

    /// Gives all taken entries back to the controller. Costs a register write, so it is done once per pass.
    #[inline]
    pub(super) fn release(&self) {
        self.doorbell.write(self.head);
    }
}
