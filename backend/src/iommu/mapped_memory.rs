//! All memory of one address space: which ranges are exposed, cut into pieces, and how a change that fails on the way
//! leaves them. The kernel's address space and the emulated one are both driven from here.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::sequence::{Failed, Piece, Sequence, Steps};
use crate::addr::{Address, Bytes, Iova, Span};
use crate::hardware::{MapError, SpaceStatistics};

/// See the top of this file.
pub struct MappedMemory {
    sequence: Sequence,
    /// Pieces end where the address is a multiple of this; the kernel can never split a mapping.
    chunk: u64,
    /// What is mapped, by pieces.
    ledger: Mutex<Ledger>,
    maps: AtomicU64,
}

impl MappedMemory {
    /// Nothing is mapped. `chunk` is a power of two, bytes.
    #[must_use]
    pub fn new(flushing: bool, chunk: u64) -> Self {
        let ledger = Mutex::default();
        Self { sequence: Sequence::new(flushing), chunk, ledger, maps: AtomicU64::new(0) }
    }

    /// See [`AddressSpace::require_flush_before_map`](crate::hardware::AddressSpace::require_flush_before_map).
    pub fn require_flush_before_map(&self) {
        self.sequence.require_flush_before_map();
    }

    /// What is mapped.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exposes all of `whole`, or nothing.
    ///
    /// # Errors
    /// The piece and the step that failed.
    pub fn add(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), (Span<Iova>, Failed)> {
        let mut progress = Progress::new(whole.span);
        for span in whole.span.chunks(self.chunk) {
            // Before it is mapped, so that no buffer is placed there meanwhile.
            self.ledger().enter(span);
            if let Err(failed) = self.sequence.map(steps, whole.part(span)) {
                self.ledger().strike(span);
                self.take_back(steps, whole.span);
                return Err((span, failed));
            }
            self.maps.fetch_add(1, Relaxed);
            if let Some(line) = progress.tick(span, Instant::now()) {
                log::info!("{line}");
            }
        }
        Ok(())
    }

    /// Unmaps what of `whole` has been exposed. The device has not been told of it, so it has written nothing there.
    fn take_back(&self, steps: &dyn Steps, whole: Span<Iova>) {
        for span in self.exposed(whole) {
            match steps.unmap(super::sequence::Space::Live, span) {
                Ok(()) => drop(self.ledger().strike(span)),
                Err(error) => log::error!("unmap {span}: {error}; it stays mapped"),
            }
        }
    }

    /// The pieces of `whole` that are mapped.
    fn exposed(&self, whole: Span<Iova>) -> Vec<Span<Iova>> {
        let ledger = self.ledger();
        whole.chunks(self.chunk).filter(|span| ledger.holds(*span)).collect()
    }

    /// Withdraws all of `whole`. When it fails, some pieces are withdrawn and the rest is still mapped; trying again goes on
    /// there.
    ///
    /// # Errors
    /// [`MapError::DeviceMustBeIdle`] asks for [`Self::remove_while_idle`]; others are final.
    pub fn remove(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), MapError> {
        self.each(
            whole,
            |piece| self.sequence.unmap(steps, piece),
            |span, (what, source)| {
                let out_of_memory = source.raw_os_error() == Some(libc::ENOMEM);
                if out_of_memory {
                    MapError::DeviceMustBeIdle { span }
                } else {
                    MapError::Kernel { what, span, source }
                }
            },
        )
    }

    /// The same from a device that has nothing in flight.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn remove_while_idle(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), MapError> {
        log::warn!("unmap {}: no memory to keep it pinned meanwhile; the device is detached for it", whole.span);
        let withdraw = |piece: Piece<'_>| self.sequence.unmap_detached(steps, piece);
        self.each(whole, withdraw, |span, (what, source)| MapError::Kernel { what, span, source })
    }

    fn each(
        &self,
        whole: Piece<'_>,
        withdraw: impl Fn(Piece<'_>) -> Result<(), Failed>,
        error: impl Fn(Span<Iova>, Failed) -> MapError,
    ) -> Result<(), MapError> {
        let spans = self.exposed(whole.span);
        if spans.is_empty() {
            return Err(MapError::NotMapped { span: whole.span });
        }
        for span in spans {
            withdraw(whole.part(span)).map_err(|failed| error(span, failed))?;
            self.ledger().strike(span);
        }
        Ok(())
    }

    /// What has been done so far.
    #[must_use]
    pub fn statistics(&self) -> SpaceStatistics {
        let mapped = self.ledger().spans().map(|span| span.len()).sum();
        SpaceStatistics { maps: self.maps.load(Relaxed), mapped, ..self.sequence.cost() }
    }

    /// In which order memory is exposed, in words.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.sequence.order()
    }
}

/// Tells a person once a second how far a long map has come; the virtual machine stands still meanwhile.
struct Progress {
    whole: Span<Iova>,
    reported: Instant,
}

impl Progress {
    fn new(whole: Span<Iova>) -> Self {
        Self { whole, reported: Instant::now() }
    }

    /// The line to write now that everything up to the end of `done` is mapped, if it is time for one.
    fn tick(&mut self, done: Span<Iova>, now: Instant) -> Option<String> {
        if now.saturating_duration_since(self.reported) < Duration::from_secs(1) {
            return None;
        }
        self.reported = now;
        let bytes = done.last().raw() - self.whole.start().raw() + 1;
        Some(format!("mapping {}: {} of {}", self.whole, Bytes(bytes), Bytes(self.whole.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_map_tells_once_a_second_how_far_it_has_come() {
        const GIB: u64 = 1 << 30;
        let whole = Span::new(Iova(4 * GIB), 16 * GIB).unwrap();
        let mut progress = Progress::new(whole);
        let start = progress.reported;

        let ticks = (1..).zip(whole.chunks(GIB));
        let told: Vec<_> =
            ticks.filter_map(|(n, done)| progress.tick(done, start + Duration::from_millis(300) * n)).collect();

        let line = |gib| format!("mapping 0x100000000+16G: {gib}G of 16G");
        assert_eq!(told, [4, 8, 12, 16].map(line), "every 1.2 s");
    }
}
