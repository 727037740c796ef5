//! Around each command, for a device whose DMA bypasses the CPU caches: what it will read or overwrite is flushed after
//! `submit` and before `ring`, what it has written is flushed again before the driver hears of it. Under a coherent verdict
//! all of this is one comparison.

use std::sync::Arc;
use std::time::Instant;

use super::bounce::Bounce;
use crate::addr::{Address, Iova, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::Operation;
use crate::engine::statistics::Counters;
use crate::hardware::CacheFlush;

/// No x86 or arm64 processor has longer cache lines, bytes.
const LONGEST_LINE: u64 = 128;

/// One worker's flushing.
pub(in crate::engine) struct CacheMaintenance {
    flush: Option<Arc<dyn CacheFlush>>,
    counters: Arc<Counters>,
}

impl CacheMaintenance {
    pub(in crate::engine) fn new(flush: Option<Arc<dyn CacheFlush>>, counters: Arc<Counters>) -> Self {
        Self { flush, counters }
    }

    /// True if the data must go through a bounce buffer for the caches' sake: where a buffer that the device writes shares
    /// a line with something else, a CPU that writes the rest of the line would write the old data back over the new.
    #[inline]
    pub(in crate::engine) fn keep_apart(&self, operation: Operation, buffers: &[Span<Iova>]) -> bool {
        let whole =
            |span: &Span<Iova>| span.start().is_aligned(LONGEST_LINE) && span.len().is_multiple_of(LONGEST_LINE);
        self.flush.is_some() && operation == Operation::Read && !buffers.iter().all(whole)
    }

    /// Between `submit` and `ring`, and again when a read has come back.
    #[inline]
    pub(in crate::engine) fn buffers(
        &self,
        guest: &GuestMemoryView,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u64,
    ) {
        self.timed(bytes, |flush| guest.flush(buffers, position, bytes, flush));
    }

    /// The same for a bounce slot.
    #[inline]
    pub(in crate::engine) fn slot(&self, bounce: &Bounce, slot: u32, bytes: u32) {
        self.timed(bytes.into(), |flush| {
            let place = bounce.slot(slot, bytes);
            flush.flush(place.shared, place.offset, place.len);
        });
    }

    #[inline]
    fn timed(&self, bytes: u64, flush: impl FnOnce(&dyn CacheFlush)) {
        let Some(caches) = &self.flush else { return };
        let start = Instant::now();
        flush(&**caches);
        self.counters.flushed_bytes.add(bytes);
        self.counters.flush_nanoseconds.add(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}
