//! Flushing whole regions: several threads for large ones, and progress once a second.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use crate::addr::Bytes;
use crate::hardware::CacheFlush;
use crate::sys::SharedMemory;

/// Below this, starting threads costs more than they save, bytes.
const ALONE: usize = 64 << 20;
/// A thread reports progress after pieces of this size, bytes.
const PIECE: usize = 16 << 20;
/// More threads than this saturate memory on no machine measured.
const MOST_THREADS: usize = 4;

/// Writes back and invalidates `len` bytes of `shared` from `offset`.
pub fn flush(caches: &dyn CacheFlush, shared: &SharedMemory, offset: usize, len: usize) {
    let processors = || thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS));
    let shares = shares(len, if len < ALONE { 1 } else { processors() });
    thread::scope(|scope| {
        let mut shares = shares.map(|share| move || flush_share(caches, shared, offset, share));
        let own = shares.next();
        shares.for_each(|share| drop(scope.spawn(share)));
        own.into_iter().for_each(|share| share());
    });
}

/// `len` bytes, in whole pages but for the last one, for each of `threads`.
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
            log::info!("flushing CPU caches: {left} of {all} to go on this thread");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::MmapRegion;

    use super::*;

    /// What it was asked to flush.
    #[derive(Default)]
    struct Asked(Mutex<Vec<Range<usize>>>);

    impl CacheFlush for Asked {
        fn flush(&self, _: &SharedMemory, offset: usize, len: usize) {
            self.0.lock().unwrap().push(offset..offset + len);
        }
    }

    /// True if `ranges` are all of `whole`, and nothing twice.
    fn make_up(mut ranges: Vec<Range<usize>>, whole: Range<usize>) -> bool {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_by_key(|range| range.start);
        let end = ranges.iter().try_fold(whole.start, |at, range| (range.start == at).then_some(range.end));
        end == Some(whole.end)
    }

    #[test]
    fn every_byte_of_a_large_range_is_flushed_once() {
        let shared = SharedMemory::of(Arc::new(MmapRegion::new(ALONE + PIECE).unwrap()));
        for (offset, len) in [(0, ALONE + PIECE), (4096, ALONE + 1), (64, ALONE - 1), (8192, PIECE + 64), (0, 0)] {
            let asked = Asked::default();

            flush(&asked, &shared, offset, len);

            let asked = asked.0.into_inner().unwrap();
            assert!(make_up(asked.clone(), offset..offset + len), "{len} bytes at {offset}: {asked:x?}");
        }
    }

    #[test]
    fn the_shares_of_any_number_of_threads_make_up_the_whole() {
        for (len, threads) in [(0, 1), (1, 4), (4097, 2), (ALONE, 3), (ALONE + 4095, 4)] {
            let shares: Vec<_> = shares(len, threads).collect();
            assert_eq!(shares.len(), threads);
            assert!(make_up(shares.clone(), 0..len), "{shares:x?}");
        }
    }
}
