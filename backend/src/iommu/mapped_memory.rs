//! All memory of one address space: it is mapped and unmapped piece by piece, and a map that fails halfway is undone. Used
//! for the kernel's address space and for the emulated one.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::sequence::{Failed, Piece, Sequence, Steps};
use crate::addr::{Address, Bytes, Iova, Span};
use crate::hardware::{MapError, SpaceStatistics};
use crate::rate_limited_log::{Limit, SharedLog};

/// The largest piece mapped in the kernel's address space by one call, in bytes.
pub(super) const CHUNK: u64 = 1 << 30;

/// See the top of this file.
pub struct MappedMemory {
    sequence: Sequence,
    /// Pieces end at multiples of this address. The kernel cannot split a mapping.
    chunk: u64,
    /// The mapped pieces.
    ledger: Mutex<Ledger>,
    maps: AtomicU64,
    /// What has failed. A front-end that maps and unmaps can repeat it.
    problems: SharedLog,
    /// Maps that take long, which a front-end can repeat.
    progress: SharedLog,
}

impl MappedMemory {
    /// With nothing mapped. `flushing` if DMA may bypass the CPU caches; `chunk` is a power of two, in bytes.
    #[must_use]
    pub fn new(flushing: bool, chunk: u64) -> Self {
        Self::with(Sequence::new(flushing), chunk)
    }

    /// As [`Self::new`], where there is no staging space.
    #[must_use]
    pub fn without_staging(flushing: bool, chunk: u64) -> Self {
        Self::with(Sequence::without_staging(flushing), chunk)
    }

    fn with(sequence: Sequence, chunk: u64) -> Self {
        let ledger = Mutex::default();
        let problems = SharedLog::new(module_path!());
        let progress = SharedLog::with_limit(module_path!(), Limit::MEMORY);
        Self { sequence, chunk, ledger, maps: AtomicU64::new(0), problems, progress }
    }

    /// See [`AddressSpace::require_flush_before_map`](crate::hardware::AddressSpace::require_flush_before_map).
    pub fn require_flush_before_map(&self) {
        self.sequence.require_flush_before_map();
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps all of `whole`, or nothing.
    ///
    /// # Errors
    /// The piece and the step that failed.
    pub fn add(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), (Span<Iova>, Failed)> {
        let mut progress = Progress::new(whole.span);
        for span in whole.span.chunks(self.chunk) {
            // Before the map, so that no buffer is placed there meanwhile.
            self.ledger().insert(span);
            if let Err(failed) = self.sequence.map(steps, whole.part(span)) {
                self.ledger().remove(span);
                self.roll_back(steps, whole);
                return Err((span, failed));
            }
            self.maps.fetch_add(1, Relaxed);
            if let Some(line) = progress.tick(span, Instant::now()) {
                self.progress.info(|| line);
            }
        }
        Ok(())
    }

    /// Unmaps the pieces of `whole` that are mapped. The guest does not know these addresses yet, but one that drives the device
    /// can have guessed them. So they are unmapped and flushed as any other memory.
    fn roll_back(&self, steps: &dyn Steps, whole: Piece<'_>) {
        for span in self.mapped_pieces(whole.span) {
            let piece = whole.part(span);
            let unmapped = match self.sequence.unmap(steps, piece) {
                Err((_, source)) if is_out_of_memory(&source) => self.sequence.unmap_unpinned(steps, piece),
                other => other.map_err(|(_, source)| source),
            };
            match unmapped {
                Ok(()) => drop(self.ledger().remove(span)),
                Err(error) => self.problems.error(|| format!("unmap {span}: {error}; it stays mapped")),
            }
        }
    }

    /// Enters one piece that another process has mapped. It overlaps no other.
    pub fn inherit(&self, piece: Span<Iova>) {
        self.ledger().insert(piece);
    }

    /// Flushes memory that another process has mapped, and of which the caches may hold something.
    ///
    /// # Errors
    /// The view has other pages than those pinned.
    pub(super) fn flush_inherited(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), Failed> {
        self.sequence.flush_mapped(steps, whole)
    }

    /// Removes the entry of one piece that [`Self::inherit`] has entered.
    pub fn forget(&self, piece: Span<Iova>) {
        self.ledger().remove(piece);
    }

    /// Exchanges what is mapped with `other`.
    pub fn exchange(&self, other: &Self) {
        std::mem::swap(&mut *self.ledger(), &mut *other.ledger());
    }

    fn mapped_pieces(&self, whole: Span<Iova>) -> Vec<Span<Iova>> {
        let ledger = self.ledger();
        whole.chunks(self.chunk).filter(|span| ledger.contains(*span)).collect()
    }

    /// Unmaps all of `whole`. On failure, the remaining pieces are still mapped; another call continues with them.
    ///
    /// # Errors
    /// [`MapError::DeviceMustBeIdle`] if [`Self::remove_while_idle`] must be used; other errors are final.
    pub fn remove(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), MapError> {
        self.unmap_pieces(
            whole,
            |piece| self.sequence.unmap(steps, piece),
            |span, (step, source)| {
                if is_out_of_memory(&source) {
                    MapError::DeviceMustBeIdle { span }
                } else {
                    MapError::Kernel { step, span, source }
                }
            },
        )
    }

    /// As [`Self::remove`], by detaching the device, which must be idle.
    ///
    /// # Errors
    /// [`MapError::Kernel`] with the step that failed.
    pub fn remove_while_idle(&self, steps: &dyn Steps, whole: Piece<'_>) -> Result<(), MapError> {
        let span = whole.span;
        let why = "no memory to keep it pinned meanwhile; the device is detached to unmap it";
        self.problems.warn(|| format!("unmap {span}: {why}"));
        let unmap = |piece: Piece<'_>| self.sequence.unmap_detached(steps, piece);
        self.unmap_pieces(whole, unmap, |span, (step, source)| MapError::Kernel { step, span, source })
    }

    fn unmap_pieces(
        &self,
        whole: Piece<'_>,
        unmap: impl Fn(Piece<'_>) -> Result<(), Failed>,
        error: impl Fn(Span<Iova>, Failed) -> MapError,
    ) -> Result<(), MapError> {
        let spans = self.mapped_pieces(whole.span);
        if spans.is_empty() {
            return Err(MapError::NotMapped { span: whole.span });
        }
        for span in spans {
            unmap(whole.part(span)).map_err(|failed| error(span, failed))?;
            self.ledger().remove(span);
        }
        Ok(())
    }

    /// Counters since the start, and the bytes mapped now.
    #[must_use]
    pub fn statistics(&self) -> SpaceStatistics {
        let mapped = self.ledger().spans().map(|span| span.len()).sum();
        SpaceStatistics { maps: self.maps.load(Relaxed), mapped, ..self.sequence.cost() }
    }

    /// The order of the steps by which memory is mapped, as text.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.sequence.order()
    }
}

fn is_out_of_memory(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOMEM)
}

/// Reports the progress of a long map once a second: the virtual machine is stalled until it ends.
struct Progress {
    whole: Span<Iova>,
    reported: Instant,
}

impl Progress {
    fn new(whole: Span<Iova>) -> Self {
        Self { whole, reported: Instant::now() }
    }

    /// Everything up to the end of `done` is mapped. Returns the line to log, if one is due.
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
    fn a_long_map_reports_its_progress_once_a_second() {
        const GIB: u64 = 1 << 30;
        let whole = Span::new(Iova(4 * GIB), 16 * GIB).unwrap();
        let mut progress = Progress::new(whole);
        let start = progress.reported;

        let ticks = (1..).zip(whole.chunks(GIB));
        let lines: Vec<_> =
            ticks.filter_map(|(n, done)| progress.tick(done, start + Duration::from_millis(300) * n)).collect();

        let line = |gib| format!("mapping 0x100000000+16G: {gib}G of 16G");
        assert_eq!(lines, [4, 8, 12, 16].map(line), "every 1.2 s");
    }
}
