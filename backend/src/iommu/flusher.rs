//! Flushes whole regions: large ones with several threads, which log their progress once a second.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use crate::addr::Bytes;
use crate::hardware::CacheFlush;
use crate::rate_limited_log::{Limit, SharedLog};
use crate::sys::SharedMemory;

/// Every thread reports once a second, for each piece of memory that is mapped or unmapped.
static LOG: SharedLog = SharedLog::with_limit(module_path!(), Limit::MEMORY);

/// Below this size (bytes) one thread flushes alone: starting more costs more time than they save.
const PARALLEL_MIN: usize = 64 << 20;
/// A thread checks whether a progress line is due after pieces of this size, in bytes.
const PIECE: usize = 16 << 20;
/// On every machine measured, this many threads saturate memory.
const MAX_THREADS: usize = 4;

/// Writes back and invalidates `len` bytes of `shared` from `offset`.
pub fn flush(caches: &dyn CacheFlush, shared: &SharedMemory, offset: usize, len: usize) {
    let processors = || thread::available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
    let shares = shares(len, if len < PARALLEL_MIN { 1 } else { processors() });
    thread::scope(|scope| {
        let mut shares = shares.map(|share| move || flush_share(caches, shared, offset, share));
        let own = shares.next();
        shares.for_each(|share| drop(scope.spawn(share)));
        own.into_iter().for_each(|share| share());
    });
}

/// Splits `len` bytes among `threads`. All shares but the last are whole pages.
fn shares(len: usize, threads: usize) -> impl Iterator<Item = Range<usize>> {
    let share = len.div_ceil(threads).next_multiple_of(rustix::param::page_size());
    (0..threads).map(move |n| (n * share).min(len)..((n + 1) * share).min(len))
}

fn flush_share(caches: &dyn CacheFlush, shared: &SharedMemory, offset: usize, share: Range<usize>) {
    let mut reported = Instant::now();
    let mut at = share.start;
    while at < share.end {
        let piece = PIECE.min(share.end - at);
        caches.flush(shared, offset + at, piece);
        at += piece;
        if reported.elapsed() >= Duration::from_secs(1) {
            reported = Instant::now();
            let (left, all) = (Bytes((share.end - at) as u64), Bytes(share.len() as u64));
            LOG.info(|| format!("flushing CPU caches: {left} of {all} left on this thread"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::MmapRegion;

    use super::*;

    /// Records the ranges flushed.
    #[derive(Default)]
    struct FlushRecorder(Mutex<Vec<Range<usize>>>);

    impl CacheFlush for FlushRecorder {
        fn flush(&self, _: &SharedMemory, offset: usize, len: usize) {
            self.0.lock().unwrap().push(offset..offset + len);
        }

        fn granule(&self) -> u64 {
            128
        }
    }

    /// True if `ranges` cover every byte of `whole` once, and nothing else.
    fn cover_once(mut ranges: Vec<Range<usize>>, whole: Range<usize>) -> bool {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().try_fold(whole.start, |at, range| (range.start == at).then_some(range.end));
        end == Some(whole.end)
    }

    #[test]
    fn every_byte_of_a_large_range_is_flushed_once() {
        const MIN: usize = PARALLEL_MIN;
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(MIN + PIECE).unwrap()));
        for (offset, len) in [(0, MIN + PIECE), (4096, MIN + 1), (64, MIN - 1), (8192, PIECE + 64), (0, 0)] {
            let recorder = FlushRecorder::default();

            flush(&recorder, &shared, offset, len);

            let flushed = recorder.0.into_inner().unwrap();
            assert!(cover_once(flushed.clone(), offset..offset + len), "{len} bytes at {offset}: {flushed:x?}");
        }
    }

    #[test]
    fn the_shares_of_any_number_of_threads_cover_every_byte_once() {
        for (len, threads) in [(0, 1), (1, 4), (4097, 2), (PARALLEL_MIN, 3), (PARALLEL_MIN + 4095, 4)] {
            let shares: Vec<_> = shares(len, threads).collect();
            assert_eq!(shares.len(), threads);
            assert!(cover_once(shares.clone(), 0..len), "{shares:x?}");
        }
    }
}
