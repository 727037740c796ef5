//! Tells lost, doubled, reordered, stale and torn requests, whatever happens to the server between submission and completion.
//!
//! It knows the content of every block exactly, except while a write to it is in flight, because no two requests in flight touch
//! the same block unless both read it:
//!
//! ```text
//! written n ── submitted(write n+1) ──► n, n+1 or parts of both ── completed ──► written n+1
//! ```
//!
//! It often writes a block again as soon as a write to it is reported. A server that does the first one again afterwards puts
//! back the old content. After the death of a server, the blocks written last are not written for a while (`frozen`), because a
//! third write would hide that.

mod stamp;
#[cfg(test)]
mod tests;
mod wrong;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::client::{Completion, Error, Request};
use crate::random::Random;

use stamp::Found;

pub use stamp::{BLOCK, Stamp};
pub use wrong::{Content, Wrong};

/// The largest request, blocks.
pub const LARGEST: u64 = 8;
/// Writes whose blocks are frozen when a server dies.
const RECENT: usize = 64;
/// Attempts to find blocks that no other request touches.
const ATTEMPTS: usize = 8;

/// A request in flight: its queue and its slot there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// Index of the virtqueue.
    pub queue: u16,
    /// Slot of the request.
    pub slot: u16,
}

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    first: u64,
    count: u64,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads blocks.
    Read(Extent),
    /// Writes blocks with this stamp.
    Write(Extent, Stamp),
    /// Flushes.
    Flush,
}

#[derive(Clone, Default)]
struct Block {
    /// The last write that was reported.
    holds: Stamp,
    /// True if that write has been read from the disk.
    seen: bool,
    readers: u32,
    writing: bool,
    frozen: bool,
}

/// A request in flight, and whether the server that it was submitted to has died.
struct Flight {
    operation: Operation,
    old: bool,
}

/// The oracle of one disk.
pub struct Oracle {
    blocks: Vec<Block>,
    flights: HashMap<Tag, Flight>,
    random: Random,
    sequence: u64,
    /// Extents of the writes reported last.
    recent: VecDeque<Extent>,
    /// The next block of a scan of the whole disk.
    scan: Option<u64>,
    completed: u64,
}

impl Oracle {
    /// The oracle of a disk of zeroes.
    ///
    /// # Panics
    /// If the disk has fewer than [`LARGEST`] blocks.
    #[must_use]
    pub fn new(blocks: u64, seed: u64) -> Self {
        assert!(blocks >= LARGEST, "{blocks} blocks");
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            flights: HashMap::new(),
            random: Random::new(seed),
            sequence: 0,
            recent: VecDeque::new(),
            scan: None,
            completed: 0,
        }
    }

    /// The next request for `queue`, which must be submitted. `None` if no blocks are free for one, or the scan is over.
    pub fn plan(&mut self, queue: u16) -> Option<Operation> {
        let operation = if let Some(first) = self.scan {
            let count = LARGEST.min(self.blocks.len() as u64 - first);
            self.scan = Some(first + count);
            (count != 0).then_some(Operation::Read(Extent { first, count }))
        } else {
            self.random_operation(queue)
        }?;
        for block in self.of(operation) {
            match operation {
                Operation::Write(..) => block.writing = true,
                _ => block.readers += 1,
            }
        }
        Some(operation)
    }

    fn random_operation(&mut self, queue: u16) -> Option<Operation> {
        if self.random.once_in(200) {
            return Some(Operation::Flush);
        }
        let write = self.random.once_in(2);
        let extent = (0..ATTEMPTS).find_map(|_| {
            let extent = self.random_extent(write);
            self.is_free(extent, write).then_some(extent)
        })?;
        if !write {
            return Some(Operation::Read(extent));
        }
        self.sequence += 1;
        Some(Operation::Write(extent, Stamp { sequence: self.sequence, writer: queue }))
    }

    /// Half of the writes go to the blocks whose write was just reported.
    fn random_extent(&mut self, write: bool) -> Extent {
        if write
            && self.random.once_in(2)
            && let Some(last) = self.recent.back()
        {
            return *last;
        }
        let first = self.random.below(self.blocks.len() as u64);
        let count = (1 + self.random.below(LARGEST)).min(self.blocks.len() as u64 - first);
        Extent { first, count }
    }

    fn is_free(&mut self, extent: Extent, write: bool) -> bool {
        let blocks = self.of(Operation::Read(extent));
        blocks.iter().all(|block| !block.writing && !(write && (block.readers != 0 || block.frozen)))
    }

    fn of(&mut self, operation: Operation) -> &mut [Block] {
        let Some(Extent { first, count }) = operation.extent() else { return &mut [] };
        let first = usize::try_from(first).expect("a small disk");
        &mut self.blocks[first..first + usize::try_from(count).expect("a small disk")]
    }

    /// `operation` has been submitted as `tag`.
    ///
    /// # Panics
    /// If `tag` is in flight.
    pub fn submitted(&mut self, tag: Tag, operation: Operation) {
        let before = self.flights.insert(tag, Flight { operation, old: false });
        assert!(before.is_none(), "{tag} is in flight");
    }

    /// What `tag` does; `None` if it is not in flight.
    #[must_use]
    pub fn in_flight(&self, tag: Tag) -> Option<Operation> {
        self.flights.get(&tag).map(|flight| flight.operation)
    }

    /// A used entry has been found on `queue`, with `data` in the buffer of its slot.
    ///
    /// # Errors
    /// What is wrong about it.
    pub fn completed(&mut self, queue: u16, done: Completion, data: &[u8]) -> Result<(), Wrong> {
        let tag = Tag { queue, slot: done.slot };
        let Some(Flight { operation, .. }) = self.flights.remove(&tag) else { return Err(Wrong::Doubled(tag)) };
        if done.status != 0 {
            return Err(Wrong::Status(tag, operation, done.status));
        }
        if done.written != operation.written() {
            return Err(Wrong::Length(tag, operation, done.written));
        }
        self.completed += 1;
        match operation {
            Operation::Read(extent) => {
                self.of(operation).iter_mut().for_each(|block| block.readers -= 1);
                extent.numbers().zip(data.chunks_exact(BLOCK)).try_for_each(|(block, bytes)| self.check(block, bytes))
            }
            Operation::Write(extent, stamp) => {
                for block in self.of(operation) {
                    (block.holds, block.writing, block.seen) = (stamp, false, false);
                }
                self.recent.push_back(extent);
                if self.recent.len() > RECENT {
                    self.recent.pop_front();
                }
                Ok(())
            }
            Operation::Flush => Ok(()),
        }
    }

    /// Checks the content of a block that no write is in flight to.
    fn check(&mut self, number: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let block = &mut self.blocks[usize::try_from(number).expect("a small disk")];
        let wanted = block.holds;
        if stamp::is(number, wanted, bytes) {
            block.seen = true;
            return Ok(());
        }
        let mut found = stamp::read(number, bytes);
        let first = found.next().expect("several sectors");
        let content = |found| Content { block: number, wanted, found };
        let (Found::Write(of, stamp), true) = (first, found.all(|next| next == first)) else {
            return Err(Wrong::Torn(content(None)));
        };
        Err(match content(Some(stamp)) {
            content if of != number || stamp.sequence >= wanted.sequence => Wrong::Misplaced(content),
            content if block.seen => Wrong::Reordered(content),
            content => Wrong::Stale(content),
        })
    }

    /// Checks all blocks that no write is in flight to. Nothing may be using `disk`.
    ///
    /// # Errors
    /// What is wrong about one of them, or the file's error.
    pub fn inspect(&mut self, disk: &File) -> Result<(), Error> {
        let mut bytes = [0; BLOCK];
        for number in 0..self.blocks.len() {
            if !self.blocks[number].writing {
                disk.read_exact_at(&mut bytes, (number * BLOCK) as u64)?;
                self.check(number as u64, &bytes)?;
            }
        }
        Ok(())
    }

    /// The server has died. Freezes the blocks written last, and releases the others unless requests in flight are still those of
    /// servers before.
    pub fn server_died(&mut self) {
        if self.old_in_flight() == 0 {
            self.blocks.iter_mut().for_each(|block| block.frozen = false);
        }
        for extent in std::mem::take(&mut self.recent) {
            self.of(Operation::Read(extent)).iter_mut().for_each(|block| block.frozen = true);
        }
        self.flights.values_mut().for_each(|flight| flight.old = true);
    }

    /// Number of requests in flight that were submitted before the last server started.
    #[must_use]
    pub fn old_in_flight(&self) -> usize {
        self.flights.values().filter(|flight| flight.old).count()
    }

    /// Number of requests completed as they must be.
    #[must_use]
    pub fn completions(&self) -> u64 {
        self.completed
    }

    /// From now on, plans only read, once, each block of the disk. No write may be in flight.
    pub fn start_scan(&mut self) {
        self.scan = Some(0);
    }

    /// The requests in flight, as lost.
    #[must_use]
    pub fn lost(&self) -> Vec<Wrong> {
        self.flights.iter().map(|(tag, flight)| Wrong::Lost(*tag, flight.operation)).collect()
    }
}

impl Extent {
    fn numbers(self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }
}

impl Operation {
    fn extent(self) -> Option<Extent> {
        match self {
            Self::Read(extent) | Self::Write(extent, _) => Some(extent),
            Self::Flush => None,
        }
    }

    /// Number of bytes of data.
    ///
    /// # Panics
    /// Never: a request has at most [`LARGEST`] blocks.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.extent().map_or(0, |extent| usize::try_from(extent.count).expect("a few blocks") * BLOCK)
    }

    /// Number of bytes that the device writes: the data of a read, and the status byte.
    fn written(self) -> u32 {
        let data = if let Self::Read(_) = self { self.bytes() } else { 0 };
        u32::try_from(data + 1).expect("a few blocks")
    }

    /// The request that does it.
    #[must_use]
    pub fn request(self) -> Request {
        let sector = self.extent().map_or(0, |extent| extent.first * (BLOCK / stamp::SECTOR) as u64);
        match self {
            Self::Read(_) => Request::Read { sector, bytes: self.bytes() },
            Self::Write(..) => Request::Write { sector, bytes: self.bytes() },
            Self::Flush => Request::Flush,
        }
    }

    /// What its buffer holds when it is submitted: the data of a write, or something that no write wrote.
    #[must_use]
    pub fn data(self) -> Vec<u8> {
        let mut data = vec![0xcc; self.bytes()];
        if let Self::Write(extent, stamp) = self {
            for (block, bytes) in extent.numbers().zip(data.chunks_exact_mut(BLOCK)) {
                stamp::fill(block, stamp, bytes);
            }
        }
        data
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} of queue {}", self.slot, self.queue)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(Extent { first, count }) => write!(f, "a read of {count} blocks at {first}"),
            Self::Write(Extent { first, count }, stamp) => {
                write!(f, "write {} of {count} blocks at {first}", stamp.sequence)
            }
            Self::Flush => write!(f, "a flush"),
        }
    }
}
