//! Cache maintenance of request data, for a device whose DMA bypasses the CPU caches. Buffers are flushed after `submit` and
//! before `ring`. Buffers that the device has written are flushed again before the used entry. With a coherent device all of
//! this costs one comparison.

use std::sync::Arc;
use std::time::Instant;

use super::bounce::Bounce;
use crate::addr::{Address, Iova, Span};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::request::Operation;
use crate::engine::statistics::Counters;
use crate::hardware::CacheFlush;

/// One worker's cache maintenance.
pub(in crate::engine) struct CacheMaintenance {
    flush: Option<Arc<dyn CacheFlush>>,
    counters: Arc<Counters>,
}

impl CacheMaintenance {
    pub(in crate::engine) fn new(flush: Option<Arc<dyn CacheFlush>>, counters: Arc<Counters>) -> Self {
        Self { flush, counters }
    }

    /// True if nothing has to be flushed.
    #[inline]
    pub(in crate::engine) fn are_coherent(&self) -> bool {
        self.flush.is_none()
    }

    /// True if the data must be bounced because a buffer that the device writes shares a cache line with other data. A CPU that
    /// writes the rest of the line would later write old data back over the device's.
    #[inline]
    pub(in crate::engine) fn must_bounce(&self, operation: Operation, buffers: &[Span<Iova>]) -> bool {
        let Some(flush) = self.flush.as_ref().filter(|_| operation == Operation::Read) else { return false };
        let granule = flush.granule();
        !buffers.iter().all(|span| span.start().is_aligned(granule) && span.len().is_multiple_of(granule))
    }

    /// Flushes buffers: between `submit` and `ring`, and again when a read has completed.
    #[inline]
    pub(in crate::engine) fn buffers(
        &self,
        guest: &GuestMemoryView,
        buffers: &[Span<Iova>],
        position: u64,
        bytes: u64,
    ) {
        if !self.are_coherent() {
            self.timed(bytes, |flush| guest.flush(buffers, position, bytes, flush));
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::SharedMemory;

    /// The caches of an A64FX.
    struct LongLines;

    impl CacheFlush for LongLines {
        fn flush(&self, _: &SharedMemory, _: usize, _: usize) {}

        fn granule(&self) -> u64 {
            256
        }
    }

    #[test]
    fn a_read_is_bounced_unless_its_buffers_are_whole_granules_of_the_cache() {
        let counters = Arc::new(Counters::default());
        let caches = CacheMaintenance::new(Some(Arc::new(LongLines)), Arc::clone(&counters));
        let buffer = |start, len| [Span::new(Iova(start), len).unwrap()];

        for (start, len, whole) in [(0x1000, 0x200, true), (0x1080, 0x200, false), (0x1000, 0x180, false)] {
            assert_eq!(caches.must_bounce(Operation::Read, &buffer(start, len)), !whole, "{len:#x} at {start:#x}");
            assert!(!caches.must_bounce(Operation::Write, &buffer(start, len)), "a CPU writes no line back late");
        }
        assert!(!CacheMaintenance::new(None, counters).must_bounce(Operation::Read, &buffer(0x1080, 0x80)));
    }
}
