//! One thread's section of the disk, and the expected content of each of its blocks.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{preadv, pwritev};

use super::Error;

/// Alignment of buffers: the minimum for direct I/O in Linux.
const ALIGNMENT: usize = 512;
const PAGE: usize = 4096;

/// The content of a block: zero, unknown, or the number of the write that it holds.
type Content = u32;
const ZERO: Content = 0;
const UNKNOWN: Content = u32::MAX;

/// The disk, as one thread uses it.
pub(crate) struct Disk {
    pub(crate) file: File,
    /// Block size, bytes.
    pub(crate) block: u64,
    /// The largest request, bytes.
    pub(crate) largest: u64,
    /// The device for `blkdiscard`; `None` if the thread does not discard.
    pub(crate) discard_device: Option<String>,
}

pub(crate) struct Section {
    disk: Disk,
    first: u64,
    contents: Vec<Content>,
    writes: Content,
    /// Aligned to a page from `base` on.
    memory: Vec<u8>,
    base: usize,
    state: u64,
}

/// Consecutive blocks of a [`Section`]: the first, and their number.
type Run = (u64, u64);

impl Section {
    /// The `count` blocks from `first` on.
    pub(crate) fn new(disk: Disk, first: u64, count: u64, seed: u64) -> Self {
        let memory = vec![0; usize::try_from(disk.largest).expect("a megabyte") + 3 * PAGE];
        let base = memory.as_ptr().align_offset(PAGE);
        let contents = vec![UNKNOWN; usize::try_from(count).expect("it fits memory")];
        let state = (seed ^ first).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { disk, first, contents, writes: 0, memory, base, state }
    }

    pub(crate) fn discards(&self) -> bool {
        self.disk.discard_device.is_some()
    }

    /// A number below `below` (xorshift64).
    pub(crate) fn random(&mut self, below: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % below
    }

    /// A random run of blocks. Small sizes are as likely as large ones.
    fn run(&mut self) -> Run {
        let count = self.contents.len() as u64;
        let most = (self.disk.largest / self.disk.block).min(count);
        let scale = 1 << self.random(u64::from(most.ilog2()) + 1);
        let length = (1 + self.random(scale)).min(most);
        (self.random(count - length + 1), length)
    }

    fn bytes(&self, (_, length): Run) -> usize {
        usize::try_from(length * self.disk.block).expect("at most a megabyte")
    }

    fn offset(&self, (start, _): Run) -> u64 {
        (self.first + start) * self.disk.block
    }

    fn contents(&mut self, (start, length): Run) -> &mut [Content] {
        let start = usize::try_from(start).expect("an index");
        &mut self.contents[start..start + usize::try_from(length).expect("a length")]
    }

    /// A random buffer for `bytes`: its start in `memory`, and the offset at which it is split into two pieces.
    fn shape(&mut self, bytes: usize) -> (usize, usize) {
        let mut up_to = |units: usize| usize::try_from(self.random(units as u64)).expect("below a length") * ALIGNMENT;
        let (skip, cut) = (up_to(PAGE / ALIGNMENT), up_to(bytes / ALIGNMENT + 1));
        (self.base + skip, cut)
    }

    pub(crate) fn read(&mut self) -> Result<(), Error> {
        let run = self.run();
        self.check(run)
    }

    pub(crate) fn read_all(&mut self) -> Result<(), Error> {
        let (count, most) = (self.contents.len() as u64, self.disk.largest / self.disk.block);
        (0..count.div_ceil(most)).try_for_each(|n| self.check((n * most, most.min(count - n * most))))
    }

    /// Reads `run` and verifies the data.
    fn check(&mut self, run: Run) -> Result<(), Error> {
        let (bytes, offset) = (self.bytes(run), self.offset(run));
        let (start, cut) = self.shape(bytes);
        // The second piece is a page further, so that the two are not contiguous.
        let (head, tail) = self.memory[start..].split_at_mut(cut);
        let gap = if cut < bytes { PAGE } else { 0 };
        let tail = &mut tail[gap..gap + bytes - cut];
        let mut pieces = [IoSliceMut::new(head), IoSliceMut::new(tail)];
        let done = preadv(&self.disk.file, &mut pieces, offset)?;
        if done != bytes {
            return Err(format!("read {done} of {bytes} bytes at {offset}").into());
        }
        self.memory.copy_within(start + cut + gap..start + gap + bytes, start + cut);
        let block = usize::try_from(self.disk.block)?;
        for n in 0..run.1 {
            let found = &self.memory[start + usize::try_from(n)? * block..][..block];
            let number = self.first + run.0 + n;
            let expected = self.contents[usize::try_from(run.0 + n)?];
            if expected != UNKNOWN && !pattern(number, expected, block).eq(found.chunks_exact(8).map(word)) {
                let at =
                    pattern(number, expected, block).zip(found.chunks_exact(8).map(word)).position(|(a, b)| a != b);
                return Err(format!(
                    "wrong data in block {number} from byte {:?}: not that of write {expected}",
                    at.map(|at| at * 8)
                )
                .into());
            }
        }
        Ok(())
    }

    pub(crate) fn write(&mut self) -> Result<(), Error> {
        let run = self.run();
        self.writes += 1;
        let content = self.writes;
        let (bytes, offset) = (self.bytes(run), self.offset(run));
        let (start, cut) = self.shape(bytes);
        let block = usize::try_from(self.disk.block)?;
        for n in 0..run.1 {
            let place = &mut self.memory[start + usize::try_from(n)? * block..][..block];
            for (place, word) in place.chunks_exact_mut(8).zip(pattern(self.first + run.0 + n, content, block)) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        self.contents(run).fill(content);
        let gap = if cut < bytes { PAGE } else { 0 };
        self.memory.copy_within(start + cut..start + bytes, start + cut + gap);
        let (head, tail) = self.memory[start..].split_at(cut);
        let pieces = [IoSlice::new(head), IoSlice::new(&tail[gap..gap + bytes - cut])];
        let done = pwritev(&self.disk.file, &pieces, offset)?;
        if done == bytes { Ok(()) } else { Err(format!("wrote {done} of {bytes} bytes at {offset}").into()) }
    }

    /// Write-zeroes, with and without the right to deallocate.
    pub(crate) fn zero(&mut self) -> Result<(), Error> {
        let run = self.run();
        let mode = match self.random(2) {
            0 => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            _ => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        };
        fallocate(&self.disk.file, mode, self.offset(run), self.bytes(run) as u64)?;
        self.contents(run).fill(ZERO);
        Ok(())
    }

    /// Uses a program, because a discard needs an ioctl and this program has no unsafe code.
    pub(crate) fn discard(&mut self) -> Result<(), Error> {
        let run = self.run();
        let (offset, bytes) = (self.offset(run).to_string(), self.bytes(run).to_string());
        let device = self.disk.discard_device.as_deref().ok_or("discards are not enabled")?;
        let done = Command::new("blkdiscard").args(["-o", &offset, "-l", &bytes, device]).status()?;
        if !done.success() {
            return Err(format!("discard {bytes} bytes at {offset}: {done}").into());
        }
        self.contents(run).fill(UNKNOWN);
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        Ok(self.disk.file.sync_data()?)
    }
}

/// The words of a block with `content`.
fn pattern(block: u64, content: Content, bytes: usize) -> impl Iterator<Item = u64> {
    let seed = (block << 32 | u64::from(content)).wrapping_mul(0xd6e8_feb8_6659_fd93) | 1;
    (0..bytes as u64 / 8)
        .map(move |n| if content == ZERO { 0 } else { seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) })
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}
