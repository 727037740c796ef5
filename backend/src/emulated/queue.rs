//! The controller's side of submission and completion queues (NVMe 2.0 §3.3.1.2).
//!
//! ```text
//! submission   head == tail  empty      host moves tail (doorbell), controller moves head and reports it
//! completion   head == tail  empty      controller moves tail and flips the phase on wrap, host moves head (doorbell)
//! ```
//!
//! Doorbells are atomics outside the queue's lock, so a register write never waits for a running command.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;

use crate::addr::{Address, Iova, Span};
use crate::sys::{SharedArray, SharedMemory};

use super::dma::Dma;
use super::fault::Effect;
use super::mapping::{Access, DmaFault};
use super::traffic::Traffic;
use super::wire::{CQE_BYTES, Entry, SQE_BYTES, Status, low16};

/// Index of the mapping last used for PRP or SGL lists, and for data.
#[derive(Default)]
pub(super) struct Hints {
    pub(super) list: usize,
    pub(super) data: usize,
}

pub(super) struct Sq {
    base: Iova,
    entries: u32,
    head: u32,
    hint: usize,
    /// Fetched commands that run later, sorted by due time.
    held: VecDeque<Held>,
    /// Identifier of its completion queue.
    pub(super) cq: u16,
    pub(super) hints: Hints,
}

impl Sq {
    pub(super) fn new(base: u64, entries: u32, cq: u16) -> Self {
        Self { base: Iova(base), entries, head: 0, hint: 0, held: VecDeque::new(), cq, hints: Hints::default() }
    }

    /// True if `tail` is a valid index.
    pub(super) fn accepts(&self, tail: u32) -> bool {
        tail < self.entries
    }

    pub(super) fn is_empty(&self, tail: u32) -> bool {
        self.head == tail
    }

    pub(super) fn head(&self) -> u16 {
        low16(self.head)
    }

    /// The queue's memory, valid while `dma` keeps the mappings unchanged.
    #[inline]
    pub(super) fn memory<'a>(&self, dma: &'a Dma<'a>) -> QueueMemory<'a, 8> {
        QueueMemory::new(dma, self.base, self.entries, self.hint)
    }

    /// Fetches the entry at the head into `entry`. Each word is read once.
    #[inline]
    pub(super) fn fetch(&mut self, memory: &QueueMemory<'_, 8>, entry: &mut Entry) -> Result<(), DmaFault> {
        match &memory.array {
            Some(array) => entry.0 = array.read(self.head as usize),
            None => self.fetch_through(memory.dma, entry)?,
        }
        self.head = if self.head + 1 == self.entries { 0 } else { self.head + 1 };
        Ok(())
    }

    #[cold]
    fn fetch_through(&mut self, dma: &Dma<'_>, entry: &mut Entry) -> Result<(), DmaFault> {
        let at = self.base.checked_add(u64::from(self.head) * SQE_BYTES);
        let span = at.and_then(|at| Span::new(at, SQE_BYTES)).ok_or_else(|| dma.fault(self.base, Access::Read))?;
        dma.each(Access::Read, span, &mut self.hint, |shared, offset, len| {
            debug_assert_eq!(len as u64, SQE_BYTES, "queues are page-aligned, so no entry crosses a page boundary");
            entry.0 = shared.read_words(offset);
            Ok(())
        })
    }

    /// Holds a command until `due`.
    pub(super) fn hold(&mut self, due: Duration, entry: &Entry, effect: Option<Effect>) {
        // If all delays are equal, this is the end of the list.
        let index = self.held.partition_point(|held| held.due <= due);
        self.held.insert(index, Held { due, entry: *entry, effect });
    }

    /// Due time of the next held command.
    #[inline]
    pub(super) fn first_due(&self) -> Option<Duration> {
        self.held.front().map(|held| held.due)
    }

    pub(super) fn take_first_held(&mut self, entry: &mut Entry) -> Option<Option<Effect>> {
        let held = self.held.pop_front()?;
        *entry = held.entry;
        Some(held.effect)
    }

    /// Removes and returns the held commands whose identifier matches.
    pub(super) fn remove_held(&mut self, matches: impl Fn(u16) -> bool) -> Vec<Entry> {
        let (removed, kept) = self.held.drain(..).partition(|held: &Held| matches(held.entry.cid()));
        self.held = kept;
        let removed: VecDeque<Held> = removed;
        removed.into_iter().map(|held| held.entry).collect()
    }
}

/// A fetched command that runs later.
struct Held {
    due: Duration,
    entry: Entry,
    effect: Option<Effect>,
}

/// A completion queue entry without its phase (NVMe 2.0 §3.3.3.2).
#[derive(Clone, Copy)]
pub(super) struct Completion {
    /// Dwords 0 and 1.
    pub(super) result: u64,
    pub(super) sq: u16,
    pub(super) sq_head: u16,
    pub(super) cid: u16,
    pub(super) status: Status,
}

pub(super) struct Cq {
    base: Iova,
    entries: u32,
    tail: u32,
    head: u32,
    phase: bool,
    hint: usize,
    /// Interrupt vector, if interrupts are enabled.
    pub(super) vector: Option<u16>,
}

/// The head doorbell has an invalid value.
pub(super) struct BadHead;

impl Cq {
    pub(super) fn new(base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self { base: Iova(base), entries, tail: 0, head: 0, phase: true, hint: 0, vector }
    }

    /// Applies the head doorbell, which may only move forward over posted entries.
    pub(super) fn set_head(&mut self, head: u32) -> Result<(), BadHead> {
        let distance = |from: u32| if self.tail >= from { self.tail - from } else { self.tail + self.entries - from };
        if head >= self.entries || distance(head) > distance(self.head) {
            return Err(BadHead);
        }
        self.head = head;
        Ok(())
    }

    #[inline]
    pub(super) fn has_room(&self) -> bool {
        let next = if self.tail + 1 == self.entries { 0 } else { self.tail + 1 };
        next != self.head
    }

    /// True if the host has acknowledged every entry.
    pub(super) fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Number of entries that can be posted with the current head.
    pub(super) fn free(&self) -> u32 {
        (self.head + self.entries - self.tail - 1) % self.entries
    }

    /// The queue's memory, valid while `dma` keeps the mappings unchanged.
    #[inline]
    pub(super) fn memory<'a>(&self, dma: &'a Dma<'a>) -> QueueMemory<'a, 2> {
        QueueMemory::new(dma, self.base, self.entries, self.hint)
    }

    /// Writes a completion at the tail. The phase is part of the word written last.
    #[inline]
    pub(super) fn post(&mut self, memory: &QueueMemory<'_, 2>, completion: &Completion) -> Result<(), DmaFault> {
        self.write(memory, completion, self.phase)
    }

    /// Like [`Self::post`], but with the wrong phase: the host takes it for an old entry.
    pub(super) fn post_with_wrong_phase(
        &mut self,
        memory: &QueueMemory<'_, 2>,
        completion: &Completion,
    ) -> Result<(), DmaFault> {
        self.write(memory, completion, !self.phase)
    }

    #[inline]
    fn write(&mut self, memory: &QueueMemory<'_, 2>, completion: &Completion, phase: bool) -> Result<(), DmaFault> {
        let fields =
            [completion.sq_head, completion.sq, completion.cid, completion.status.bits() << 1 | u16::from(phase)];
        let back = fields.iter().rev().fold(0, |word, field| word << 16 | u64::from(*field));
        let words = [completion.result, back];
        match &memory.array {
            Some(array) => array.write_release(self.tail as usize, words),
            None => self.write_through(memory.dma, words)?,
        }
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
        Ok(())
    }

    #[cold]
    fn write_through(&mut self, dma: &Dma<'_>, [front, back]: [u64; 2]) -> Result<(), DmaFault> {
        let at = self.base.checked_add(u64::from(self.tail) * CQE_BYTES);
        let span = at.and_then(|at| Span::new(at, CQE_BYTES)).ok_or_else(|| dma.fault(self.base, Access::Write))?;
        dma.each(Access::Write, span, &mut self.hint, |shared, offset, len| {
            debug_assert_eq!(len as u64, CQE_BYTES, "queues are page-aligned, so no entry crosses a page boundary");
            shared.write_u64(offset, front);
            shared.store_release_u64(offset + 8, back);
            Ok(())
        })
    }
}

/// The memory of a queue whose entries have `N` words. If the queue is not in one mapping, each entry is looked up separately.
pub(super) struct QueueMemory<'a, const N: usize> {
    dma: &'a Dma<'a>,
    array: Option<SharedArray<&'a SharedMemory, u64, N>>,
}

impl<'a, const N: usize> QueueMemory<'a, N> {
    #[inline]
    fn new(dma: &'a Dma<'a>, base: Iova, entries: u32, hint: usize) -> Self {
        let whole = Span::new(base, u64::from(entries) * (N * size_of::<u64>()) as u64);
        let found = whole.and_then(|whole| dma.shared(whole, hint));
        Self { dma, array: found.and_then(|(shared, offset)| shared.array(offset, entries as usize)) }
    }
}

/// The slot of a submission queue identifier. The alignment keeps two workers' doorbells in separate cache lines.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct SqSlot {
    /// Last value of the tail doorbell.
    pub(super) tail: AtomicU32,
    /// True while the queue exists.
    pub(super) open: AtomicBool,
    pub(super) state: Mutex<SqState>,
}

#[derive(Default)]
pub(super) struct SqState {
    pub(super) queue: Option<Sq>,
    pub(super) traffic: Traffic,
}

/// The slot of a completion queue identifier.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct CqSlot {
    /// Last value of the head doorbell.
    pub(super) head: AtomicU32,
    /// True while the queue exists.
    pub(super) open: AtomicBool,
    /// True if a submission queue stopped because this queue was full. A head doorbell write runs it again.
    pub(super) starved: AtomicBool,
    pub(super) queue: Mutex<Option<Cq>>,
}
