//! Guest memory that both front-ends have, as with QEMU's `cpr-transfer`. The second space borrows it from the first one, which maps it
//! at the same address from the same file and offset:
//!
//! ```text
//! add       in the second space: entered in its ledger, with no call to the kernel
//! remove    in the second space: the entry goes
//!           in the first space: copied to the second one before; both share the pin
//! exchange  all is borrowed, and the first space has nothing else: the device keeps its page table, and nothing is mapped
//!           else: what is borrowed is copied, and the page tables are exchanged
//! ```
//!
//! It was flushed when it was pinned. Memory that is mapped by address is not borrowed: its pages cannot be pinned again, after a
//! release of the device, once the first front-end's view is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::Relaxed;

use super::Live;
use super::mapped_memory::CHUNK;
use super::second::{COPY, none};
use super::space_description::MappedRegion;
use crate::addr::Iova;
use crate::hardware::MapError;
use crate::memory::Region;
use crate::rate_limited_log::SharedLog;

/// A front-end can have memory mapped and unmapped again and again.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Where the regions of a space start that it borrows.
pub(super) type Borrowed = BTreeSet<Iova>;

/// True if the regions `wanted` are those of the `first` space, and all of them are `borrowed`.
fn is_all(borrowed: &Borrowed, first: &BTreeMap<Iova, MappedRegion>, wanted: &BTreeMap<Iova, MappedRegion>) -> bool {
    let first_has_no_other = first == wanted;
    let none_is_mapped_twice = wanted.keys().eq(borrowed);
    first_has_no_other && none_is_mapped_twice
}

impl Live {
    /// In the second space: borrows `region`, if the first space maps the same. False if it must be mapped.
    pub(super) fn borrow_region(&self, region: &Region) -> bool {
        let Some(first) = self.twin.first() else { return false };
        let (span, wanted) = (region.iova(), MappedRegion::of(region));
        let is_same = first.hand_over.state().regions.get(&span.start()) == Some(&wanted);
        // An unmap that has failed may have left a part.
        let is_whole = span.chunks(CHUNK).all(|piece| first.mapped.ledger().contains(piece));
        if !is_same || !is_whole || first.maps_by_address.load(Relaxed) {
            return false;
        }
        span.chunks(CHUNK).for_each(|piece| self.mapped.inherit(piece));
        if let Some(staging) = &self.staging {
            staging.flushable().insert(span.start(), (span, region.memory().clone()));
        }
        self.twin.borrowed().insert(span.start());
        LOG.info(|| format!("region {span} is mapped already, for the front-end before"));
        true
    }

    /// Removes the entry of `region`, if it is borrowed. False if it must be unmapped.
    pub(super) fn give_back(&self, region: &Region) -> bool {
        let span = region.iova();
        let was_borrowed = self.twin.borrowed().remove(&span.start());
        if was_borrowed {
            span.chunks(CHUNK).for_each(|piece| self.mapped.forget(piece));
            if let Some(staging) = &self.staging {
                staging.flushable().remove(&span.start());
            }
            self.hand_over.unmapped(span);
        }
        was_borrowed
    }

    /// In the first space: `region` is about to be unmapped. The second one keeps it, if it has borrowed it. If that fails, it stays
    /// borrowed, and the exchange fails.
    pub(super) fn lend_no_more(&self, region: &Region) {
        let guard = self.twin.second();
        let Some(second) = guard.get() else { return };
        let start = region.iova().start();
        let is_borrowed = second.twin.borrowed().contains(&start);
        if is_borrowed && let Err(error) = second.copy_borrowed(self, start) {
            LOG.error(|| format!("{error}; the next front-end cannot have its turn"));
        }
    }

    /// True if the device need not move to this space, because all that is mapped here is what `first` maps.
    pub(super) fn borrows_all(&self, first: &Self) -> bool {
        is_all(&self.twin.borrowed(), &first.hand_over.state().regions, &self.hand_over.state().regions)
    }

    /// Maps all that is borrowed in this space.
    ///
    /// # Errors
    /// The first copy that failed. What was copied before stays.
    pub(super) fn copy_all_borrowed(&self, first: &Self) -> Result<(), MapError> {
        let all = self.twin.borrowed().clone();
        all.into_iter().try_for_each(|start| self.copy_borrowed(first, start))
    }

    fn copy_borrowed(&self, first: &Self, start: Iova) -> Result<(), MapError> {
        let wanted = self.hand_over.state().regions.get(&start).cloned();
        let found = first.hand_over.state().regions.get(&start).cloned();
        let region = wanted.filter(|wanted| found.as_ref() == Some(wanted));
        let region = region.ok_or_else(|| none(format!("what it shares at {start} is no longer mapped")))?;
        let span = region.range.span().map_err(|error| none(error.to_string()))?;
        first.copy_to(self, span, region.writable).map_err(|source| MapError::Kernel { step: COPY, span, source })?;
        self.twin.borrowed().remove(&start);
        Ok(())
    }

    /// Exchanges what is known of guest memory with `other`. The mappings stay where they are.
    pub(super) fn exchange_regions(&self, other: &Self) {
        if let (Some(mine), Some(others)) = (&self.staging, &other.staging) {
            std::mem::swap(&mut *mine.flushable(), &mut *others.flushable());
        }
        std::mem::swap(&mut self.hand_over.state().regions, &mut other.hand_over.state().regions);
    }
}

#[cfg(test)]
mod tests {
    use super::super::space_description::MappedRange;
    use super::*;

    fn region(start: u64, offset: u64) -> (Iova, MappedRegion) {
        let range = MappedRange { start, len: 4096 };
        let file = serde_json::from_str(r#"{"device":1,"inode":2}"#).unwrap();
        (Iova(start), MappedRegion { range, file, offset, writable: true })
    }

    #[test]
    fn a_device_keeps_its_page_table_only_if_all_regions_are_borrowed_and_the_first_space_has_no_other() {
        let two = BTreeMap::from([region(0, 0), region(8192, 4096)]);
        let one = BTreeMap::from([region(0, 0)]);
        let other = BTreeMap::from([region(0, 0), region(8192, 8192)]);
        let both = Borrowed::from([Iova(0), Iova(8192)]);
        let half = Borrowed::from([Iova(0)]);

        assert!(is_all(&both, &two, &two));
        assert!(!is_all(&half, &two, &two), "one is mapped in the second space");
        assert!(!is_all(&half, &two, &one), "the device would reach what only the first front-end had");
        assert!(!is_all(&both, &one, &two), "the first space has unmapped one");
        assert!(!is_all(&both, &other, &two), "the first space has other memory there");
    }
}
