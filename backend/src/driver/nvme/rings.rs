//! The submission and completion ring of a queue pair, and their doorbells.
//!
//! ```text
//! submission:  driver writes entry at tail, ring() -> tail doorbell;        completions report the head
//! completion:  controller writes entry, its phase bit inverted per wrap;    driver reads, update_head() -> head doorbell
//! ```
//!
//! One worker owns a ring, so its state needs no atomics. Only a completion is read with acquire ordering: its phase bit says
//! whether the rest of it is valid (NVMe 2.0 §3.3.1, §3.3.3.2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::regs::{PAGE_LEN, completion_doorbell, submission_doorbell};
use super::spec::{CompletionEntry, SubmissionEntry};
use crate::addr::Iova;
use crate::hardware::{CacheFlush, DmaBuffer, Registers};
use crate::sys::{SharedArray, SharedMemory};

/// Memory shared with the device: this process's view and the device's address. `Controller` owns the mapping and frees it
/// only after the device has stopped.
#[derive(Clone)]
pub struct QueueMemory {
    /// This process's view.
    pub memory: SharedMemory,
    /// Device address of the first byte.
    pub iova: Iova,
    /// Flushes CPU caches for a non-coherent device; `None` if the device is coherent.
    pub caches: Option<Arc<dyn CacheFlush>>,
}

impl QueueMemory {
    /// Refers to `buffer`, which must live until the device has stopped.
    #[must_use]
    pub fn new(buffer: &DmaBuffer, caches: Option<Arc<dyn CacheFlush>>) -> Self {
        Self { memory: buffer.memory().clone(), iova: buffer.span().start(), caches }
    }

    /// Flushes and invalidates `len` bytes from `offset`: between a write and the doorbell, or before a read.
    #[inline]
    pub(super) fn flush(&self, offset: usize, len: usize) {
        if self.caches.is_some() {
            self.flush_lines(offset, len);
        }
    }

    /// Not inlined, so that a coherent device costs only one comparison.
    #[inline(never)]
    fn flush_lines(&self, offset: usize, len: usize) {
        if let Some(caches) = &self.caches {
            caches.flush(&self.memory, offset, len);
        }
    }

    /// The `count` entries of a ring that starts here.
    fn entries<const N: usize>(&self, count: u16) -> SharedArray<SharedMemory, u64, N> {
        self.memory.array(0, count.into()).expect("rings are page-aligned and sized for their entries").into_owned()
    }

    /// The `len` bytes from `offset`, which must lie inside.
    pub(super) fn slice(&self, offset: usize, len: usize) -> Self {
        let memory = self.memory.slice(offset, len).expect("queue memory is sized for its contents");
        Self { memory, iova: Iova(self.iova.0 + offset as u64), caches: self.caches.clone() }
    }
}

/// The doorbell registers of a controller.
#[derive(Clone)]
pub struct Doorbells {
    /// The controller's registers, large enough for the queue's doorbells.
    pub registers: Arc<dyn Registers>,
    /// Distance between two doorbells, bytes (CAP.DSTRD).
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

/// Memory for a submission ring of `entries`, bytes, in whole pages.
pub(super) fn submission_bytes(entries: u16) -> usize {
    (usize::from(entries) * size_of::<SubmissionEntry>()).next_multiple_of(PAGE_LEN)
}

/// Memory for a completion ring of `entries`, bytes, in whole pages.
pub(super) fn completion_bytes(entries: u16) -> usize {
    (usize::from(entries) * size_of::<CompletionEntry>()).next_multiple_of(PAGE_LEN)
}

/// Memory that a queue of `depth` entries needs, bytes.
#[must_use]
pub fn memory_needed(depth: u16) -> usize {
    lists_at(depth) + usize::from(slots(depth)) * PAGE_LEN
}

/// Offset of the completion ring in the queue's memory, bytes; the submission ring is at 0.
#[must_use]
pub fn completions_at(depth: u16) -> usize {
    submission_bytes(depth)
}

/// Offset of the list page of slot 0, bytes.
pub(super) fn lists_at(depth: u16) -> usize {
    submission_bytes(depth) + completion_bytes(depth)
}

/// Maximum commands in flight: one entry of a ring stays unused. So slot 255 does not exist, and no command identifier is
/// FFFFh, which is reserved (NVMe 2.0 §3.3.3.1).
pub(super) fn slots(depth: u16) -> u16 {
    depth - 1
}

/// The driver's side of a submission queue.
pub(super) struct SubmissionRing {
    memory: QueueMemory,
    entries: SharedArray<SharedMemory, u64, 8>,
    size: u16,
    /// First entry that the controller has not reported as read.
    head: u16,
    /// Next entry to write.
    tail: u16,
    /// Value last written to the doorbell. The controller does not know of the entries from here to `tail` yet.
    doorbell_tail: u16,
    /// Number of entries from `head` to `doorbell_tail`.
    rung: u16,
    doorbell: Doorbell,
}

impl SubmissionRing {
    pub(super) fn new(memory: &QueueMemory, queue: u16, size: u16, doorbells: &Doorbells) -> Self {
        let offset = submission_doorbell(queue, doorbells.stride);
        let doorbell = Doorbell { registers: Arc::clone(&doorbells.registers), offset };
        let entries = memory.entries(size);
        Self { memory: memory.clone(), entries, size, head: 0, tail: 0, doorbell_tail: 0, rung: 0, doorbell }
    }

    #[inline]
    fn next(&self, index: u16) -> u16 {
        if index + 1 == self.size { 0 } else { index + 1 }
    }

    /// True if no entry can be written. One entry always stays unused, to distinguish full from empty. NVMe 2.0 §3.3.1.5
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.next(self.tail) == self.head
    }

    /// Writes one entry, which [`Self::ring`] makes known to the controller. The ring must not be full.
    #[inline]
    pub(super) fn push(&mut self, entry: &SubmissionEntry) {
        debug_assert!(!self.is_full());
        self.entries.write(self.tail.into(), entry.words());
        self.tail = self.next(self.tail);
    }

    /// Flushes the entries written since the last doorbell, for a controller that does not snoop.
    #[inline]
    fn flush(&self) {
        let at = |index: u16| usize::from(index) * size_of::<SubmissionEntry>();
        let (from, to) = (at(self.doorbell_tail), at(self.tail));
        if from < to {
            self.memory.flush(from, to - from);
        } else {
            self.memory.flush(from, at(self.size) - from);
            self.memory.flush(0, to);
        }
    }

    /// Writes the doorbell if there are new entries; returns whether it did.
    #[inline]
    pub(super) fn ring(&mut self) -> bool {
        if self.doorbell_tail == self.tail {
            return false;
        }
        self.flush();
        self.doorbell.write(self.tail);
        self.doorbell_tail = self.tail;
        self.rung = self.entries_up_to(self.tail);
        true
    }

    /// Sets the head that the controller reports; false, without effect, if it lies beyond the last doorbell.
    #[inline]
    pub(super) fn set_head(&mut self, head: u16) -> bool {
        let read = self.entries_up_to(head);
        let plausible = head < self.size && read <= self.rung;
        if plausible {
            self.head = head;
            self.rung -= read;
        }
        plausible
    }

    /// Number of entries from `head` to `index`.
    #[inline]
    fn entries_up_to(&self, index: u16) -> u16 {
        if index >= self.head { index - self.head } else { self.size - self.head + index }
    }
}

/// The driver's side of a completion queue.
pub(super) struct CompletionRing {
    memory: QueueMemory,
    entries: SharedArray<SharedMemory, u64, 2>,
    size: u16,
    head: u16,
    /// Phase bit of new entries; inverted at each wrap.
    phase: bool,
    doorbell: Doorbell,
}

impl CompletionRing {
    /// The memory must be zeroed: the phase of the first pass through the ring is 1.
    pub(super) fn new(memory: &QueueMemory, queue: u16, size: u16, doorbells: &Doorbells) -> Self {
        let offset = completion_doorbell(queue, doorbells.stride);
        let doorbell = Doorbell { registers: Arc::clone(&doorbells.registers), offset };
        let entries = memory.entries(size);
        Self { memory: memory.clone(), entries, size, head: 0, phase: true, doorbell }
    }

    /// Number of entries: the most that a well-behaved controller can have posted at once.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Removes the next completion, if the controller has written one.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<CompletionEntry> {
        let at = usize::from(self.head);
        // Drop a stale cached line. This process never writes to it, so the flush writes nothing back.
        self.memory.flush(at * size_of::<CompletionEntry>(), size_of::<CompletionEntry>());
        // Dwords 2 and 3 are read first and in one access. The controller writes the phase bit, in dword 3, last: if it is
        // new, all dwords are.
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

    /// Where the next completion will be, for [`CompletionWatch`].
    pub(super) fn position(&self) -> u32 {
        u32::from(self.head) << 1 | u32::from(self.phase)
    }

    /// A view for another thread. `position` holds the current [`Self::position`].
    pub(super) fn watch(&self, position: Arc<AtomicU32>) -> CompletionWatch {
        CompletionWatch { memory: self.memory.clone(), entries: self.memory.entries(self.size), position }
    }

    /// Releases all removed entries to the controller. This is a register write, so call it once per batch.
    #[inline]
    pub(super) fn update_head(&self) {
        self.doorbell.write(self.head);
    }
}

/// Tells, on any thread, whether a completion ring has an entry that its owner has not removed.
pub(super) struct CompletionWatch {
    memory: QueueMemory,
    entries: SharedArray<SharedMemory, u64, 2>,
    position: Arc<AtomicU32>,
}

impl CompletionWatch {
    /// True if there is an entry. While the owner removes one, it may still count.
    pub(super) fn has_completion(&self) -> bool {
        let position = self.position.load(Ordering::Acquire);
        let at = usize::try_from(position >> 1).expect("a ring index");
        let bytes = size_of::<CompletionEntry>();
        self.memory.flush(at * bytes, bytes);
        let entry = CompletionEntry::from_words(self.entries.read_acquire(at));
        entry.status & 1 == u16::from(position & 1 == 1)
    }
}
