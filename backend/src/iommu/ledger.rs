//! Which IOVA ranges are taken. Pure bookkeeping beside the kernel's own: it answers *before* a map is tried, so that an
//! error can name what is in the way, and it finds room for the driver's own buffers.

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

    /// Enters a span that has no [`Self::conflict`].
    pub(super) fn enter(&mut self, span: Span<Iova>) {
        debug_assert!(self.conflict(span).is_none(), "{span} is taken");
        self.taken.insert(span.start(), span);
    }

    /// Strikes out exactly `span`; false if it was not entered.
    pub(super) fn strike(&mut self, span: Span<Iova>) -> bool {
        let known = self.holds(span);
        if known {
            self.taken.remove(&span.start());
        }
        known
    }

    /// True if exactly `span` is entered.
    pub(super) fn holds(&self, span: Span<Iova>) -> bool {
        self.taken.get(&span.start()) == Some(&span)
    }

    /// Everything entered, in order.
    pub(super) fn spans(&self) -> impl Iterator<Item = Span<Iova>> + '_ {
        self.taken.values().copied()
    }

    /// The highest free range of `len` bytes, aligned to `alignment` (a power of two), inside one of `allowed`. High,
    /// because guest RAM grows from address zero.
    pub(super) fn highest_gap(&self, allowed: &[Span<Iova>], len: u64, alignment: u64) -> Option<Span<Iova>> {
        allowed.iter().rev().find_map(|shared| self.highest_gap_in(*shared, len, alignment))
    }

    fn highest_gap_in(&self, shared: Span<Iova>, len: u64, alignment: u64) -> Option<Span<Iova>> {
        let mut last = shared.last();
        loop {
            let start = Iova(last.raw().checked_sub(len - 1)? & !(alignment - 1));
            let candidate = Span::new(start, len)?;
            if !shared.covers(&candidate) {
                return None;
            }
            match self.conflict(candidate) {
                None => return Some(candidate),
                Some(taken) => last = Iova(taken.start().raw().checked_sub(1)?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span<Iova> {
        Span::new(Iova(start), len).unwrap()
    }

    fn ledger(spans: &[Span<Iova>]) -> Ledger {
        let mut ledger = Ledger::default();
        spans.iter().for_each(|span| ledger.enter(*span));
        ledger
    }

    #[test]
    fn a_conflict_names_the_entry_in_the_way() {
        let ledger = ledger(&[span(0, 0x1000), span(0x4000, 0x4000)]);
        assert_eq!(ledger.conflict(span(0x7fff, 1)), Some(span(0x4000, 0x4000)));
        assert_eq!(ledger.conflict(span(0x1000, 0x3000)), None);
        assert_eq!(ledger.conflict(span(0x8000, u64::MAX - 0x8000)), None);
    }

    #[test]
    fn only_an_exact_entry_is_struck_out() {
        let mut ledger = ledger(&[span(0x4000, 0x4000)]);
        assert!(!ledger.strike(span(0x4000, 0x1000)));
        assert!(ledger.strike(span(0x4000, 0x4000)));
        assert_eq!(ledger.spans().count(), 0);
    }

    #[test]
    fn the_highest_gap_lies_below_what_is_taken() {
        let allowed = [span(0, 0xfee0_0000), span(0xfef0_0000, 0x10_0000)];
        let ledger = ledger(&[span(0xfeff_f000, 0x1000)]);
        assert_eq!(ledger.highest_gap(&allowed, 0x2000, 0x1000), Some(span(0xfeff_d000, 0x2000)));
    }

    #[test]
    fn a_window_that_is_too_small_is_passed_over() {
        let allowed = [span(0, 0xfee0_0000), span(0xfef0_0000, 0x1000)];
        assert_eq!(Ledger::default().highest_gap(&allowed, 0x2000, 0x1000), Some(span(0xfedf_e000, 0x2000)));
        assert_eq!(Ledger::default().highest_gap(&[span(0, 0x1000)], 0x2000, 0x1000), None);
    }
}
