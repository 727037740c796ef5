//! The IOVA ranges in use. The kernel keeps its own record; this one is needed to name the conflicting range in an error, and
//! to find room for the driver's own buffers.

use std::collections::BTreeMap;

use crate::addr::{Address, Iova, Span};

/// Disjoint spans by start address.
#[derive(Default)]
pub(super) struct Ledger {
    taken: BTreeMap<Iova, Span<Iova>>,
}

impl Ledger {
    /// The entry that overlaps `span`, if any.
    pub(super) fn conflict(&self, span: Span<Iova>) -> Option<Span<Iova>> {
        let (_, before) = self.taken.range(..=span.last()).next_back()?;
        before.overlaps(&span).then_some(*before)
    }

    /// Adds a span that has no [`Self::conflict`].
    pub(super) fn insert(&mut self, span: Span<Iova>) {
        debug_assert!(self.conflict(span).is_none(), "{span} is taken");
        self.taken.insert(span.start(), span);
    }

    /// Adds a span that may overlap others: one span covers them all then.
    pub(super) fn cover(&mut self, span: Span<Iova>) {
        let mut whole = span;
        while let Some(taken) = self.conflict(whole) {
            self.taken.remove(&taken.start());
            let (start, last) = (whole.start().min(taken.start()), whole.last().max(taken.last()));
            whole = Span::inclusive(start, last).expect("it has both");
        }
        self.insert(whole);
    }

    /// Removes exactly `span`; false if there is no such entry.
    pub(super) fn remove(&mut self, span: Span<Iova>) -> bool {
        let known = self.contains(span);
        if known {
            self.taken.remove(&span.start());
        }
        known
    }

    /// True if there is an entry of exactly `span`.
    pub(super) fn contains(&self, span: Span<Iova>) -> bool {
        self.taken.get(&span.start()) == Some(&span)
    }

    /// All entries, sorted.
    pub(super) fn spans(&self) -> impl Iterator<Item = Span<Iova>> + '_ {
        self.taken.values().copied()
    }

    /// The highest free range of `len` bytes inside one of `allowed`, aligned to `alignment` (a power of two). The highest,
    /// because guest RAM starts at address zero.
    pub(super) fn highest_gap(&self, allowed: &[Span<Iova>], len: u64, alignment: u64) -> Option<Span<Iova>> {
        allowed.iter().rev().find_map(|range| self.highest_gap_in(*range, len, alignment))
    }

    fn highest_gap_in(&self, range: Span<Iova>, len: u64, alignment: u64) -> Option<Span<Iova>> {
        let mut last = range.last();
        loop {
            let start = Iova(last.raw().checked_sub(len - 1)? & !(alignment - 1));
            let candidate = Span::new(start, len)?;
            if !range.covers(&candidate) {
                return None;
            }
            match self.conflict(candidate) {
                None => return Some(candidate),
                Some(taken) => last = Iova(taken.start().raw().checked_sub(1)?),
            }
        }
    }
}

/// The spans as text.
pub(super) fn list(spans: &[Span<Iova>]) -> String {
    let words: Vec<_> = spans.iter().map(|span| format!("{}-{}", span.start(), span.last())).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span<Iova> {
        Span::new(Iova(start), len).unwrap()
    }

    fn ledger(spans: &[Span<Iova>]) -> Ledger {
        let mut ledger = Ledger::default();
        spans.iter().for_each(|span| ledger.insert(*span));
        ledger
    }

    #[test]
    fn a_conflict_names_the_overlapping_entry() {
        let ledger = ledger(&[span(0, 0x1000), span(0x4000, 0x4000)]);
        assert_eq!(ledger.conflict(span(0x7fff, 1)), Some(span(0x4000, 0x4000)));
        assert_eq!(ledger.conflict(span(0x1000, 0x3000)), None);
        assert_eq!(ledger.conflict(span(0x8000, u64::MAX - 0x8000)), None);
    }

    #[test]
    fn spans_that_overlap_are_covered_by_one() {
        let mut ledger = ledger(&[span(0, 0x1000), span(0x4000, 0x4000), span(0xa000, 0x1000)]);
        ledger.cover(span(0x6000, 0x5000));
        ledger.cover(span(0x2000, 0x1000));
        let all = [span(0, 0x1000), span(0x2000, 0x1000), span(0x4000, 0x7000)];
        assert_eq!(ledger.spans().collect::<Vec<_>>(), all);
    }

    #[test]
    fn only_an_exact_entry_is_removed() {
        let mut ledger = ledger(&[span(0x4000, 0x4000)]);
        assert!(!ledger.remove(span(0x4000, 0x1000)));
        assert!(ledger.remove(span(0x4000, 0x4000)));
        assert_eq!(ledger.spans().count(), 0);
    }

    #[test]
    fn the_highest_gap_lies_below_the_entries() {
        let allowed = [span(0, 0xfee0_0000), span(0xfef0_0000, 0x10_0000)];
        let ledger = ledger(&[span(0xfeff_f000, 0x1000)]);
        assert_eq!(ledger.highest_gap(&allowed, 0x2000, 0x1000), Some(span(0xfeff_d000, 0x2000)));
    }

    #[test]
    fn an_allowed_range_that_is_too_small_is_skipped() {
        let allowed = [span(0, 0xfee0_0000), span(0xfef0_0000, 0x1000)];
        assert_eq!(Ledger::default().highest_gap(&allowed, 0x2000, 0x1000), Some(span(0xfedf_e000, 0x2000)));
        assert_eq!(Ledger::default().highest_gap(&[span(0, 0x1000)], 0x2000, 0x1000), None);
    }
}
