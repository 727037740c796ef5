//! Flushing whole regions: several threads for large ones, progress once a second, and a count of what it cost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::addr::Bytes;
use crate::sys::{CacheLines, Window};

/// Below this, starting threads costs more than they save.
const ALONE: usize = 64 << 20;
/// A thread reports progress after each piece of this size.
const PIECE: usize = 16 << 20;
/// More threads than this saturate memory on no machine measured.
const MOST_THREADS: usize = 4;

/// When a flush happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Pinned, not yet reachable by the device: what the CPUs hold back reaches DRAM before the device can look.
    Map,
    /// No longer reachable, still pinned: stale lines are dropped before the page has its next life.
    Unmap,
}

/// Flushes with this CPU's instruction and keeps count.
pub struct Flusher {
    lines: CacheLines,
    map_bytes: AtomicU64,
    unmap_bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// What has been flushed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Bytes flushed before they became reachable.
    pub map_bytes: u64,
    /// Bytes flushed after they had become unreachable.
    pub unmap_bytes: u64,
    /// Time spent.
    pub time: Duration,
}

impl Flusher {
    /// A flusher that has flushed nothing.
    #[must_use]
    pub fn new(lines: CacheLines) -> Self {
        Self { lines, map_bytes: AtomicU64::new(0), unmap_bytes: AtomicU64::new(0), nanoseconds: AtomicU64::new(0) }
    }

    /// The instruction it uses.
    #[must_use]
    pub fn lines(&self) -> CacheLines {
        self.lines
    }

    /// Writes back and invalidates `len` bytes of `window` from `offset`.
    pub fn flush(&self, moment: Moment, window: &Window, offset: usize, len: usize) {
        let start = Instant::now();
        let threads =
            if len < ALONE { 1 } else { thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)) };
        let share = len.div_ceil(threads).next_multiple_of(rustix::param::page_size());
        thread::scope(|scope| {
            let part = |n: usize| (n * share).min(len)..((n + 1) * share).min(len);
            for n in 1..threads {
                scope.spawn(move || self.flush_part(window, offset, part(n)));
            }
            self.flush_part(window, offset, part(0));
        });
        let counter = if moment == Moment::Map { &self.map_bytes } else { &self.unmap_bytes };
        counter.fetch_add(len as u64, Ordering::Relaxed);
        let spent = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(spent, Ordering::Relaxed);
    }

    fn flush_part(&self, window: &Window, offset: usize, part: std::ops::Range<usize>) {
        let mut reported = Instant::now();
        let (mut at, end) = (part.start, part.end);
        while at < end {
            let piece = PIECE.min(end - at);
            self.lines.flush(window, offset + at, piece);
            at += piece;
            if reported.elapsed() >= Duration::from_secs(1) {
                reported = Instant::now();
                log::info!(
                    "flushing CPU caches: {} of {} to go on this thread",
                    Bytes((end - at) as u64),
                    Bytes(end as u64)
                );
            }
        }
    }

    /// What has been flushed so far.
    #[must_use]
    pub fn flushed(&self) -> Flushed {
        Flushed {
            map_bytes: self.map_bytes.load(Ordering::Relaxed),
            unmap_bytes: self.unmap_bytes.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vm_memory::MmapRegion;

    #[test]
    fn every_byte_is_counted_once_at_its_moment() {
        let flusher = Flusher::new(CacheLines::detect().unwrap());
        let window = Window::of(Arc::new(MmapRegion::new(ALONE + 4096).unwrap()));

        flusher.flush(Moment::Map, &window, 4096, ALONE);
        flusher.flush(Moment::Unmap, &window, 0, 1);

        let flushed = flusher.flushed();
        assert_eq!((flushed.map_bytes, flushed.unmap_bytes), (ALONE as u64, 1));
    }
}
