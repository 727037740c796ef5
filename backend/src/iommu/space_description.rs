//! What a successor is told of an address space. It comes over a socket, so all of it is checked: here against itself and the
//! ranges that the IOMMU allows, in `handed_over.rs` against the kernel.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use super::ledger::{Ledger, list};
use super::mapped_memory::CHUNK;
use crate::addr::{Address, Bytes, Iova, Span};
use crate::memory::{FileId, HostPage, Region};

/// The largest and the smallest window for the successor's buffers, bytes. A queue pair needs about 2 MiB.
pub(super) const WINDOW: (u64, u64) = (1 << 30, 16 << 20);
/// What the kernel maps in, bytes.
pub(super) fn page() -> u64 {
    HostPage::of_system().bytes()
}
/// More ranges than any front-end has, and fewer than a hostile description could hold.
const MAX_RANGES: usize = 65536;

/// An address space as its successor must know it. All addresses and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceDescription {
    /// Object number of the device.
    pub device: u32,
    /// Object number of the IOAS.
    pub ioas: u32,
    /// Object number of the page table that the device is attached to.
    pub page_table: u32,
    /// The staging space, if DMA is not coherent.
    pub staging: Option<StagingDescription>,
    /// Mapped guest memory.
    pub regions: Vec<MappedRegion>,
    /// Mappings of the predecessor's own memory.
    pub buffers: Vec<MappedRange>,
    /// Where the successor may map its own memory before it has taken over. Nothing is mapped there.
    pub window: MappedRange,
    /// True if the pinned memory counts against the limit of the user, and so the account can be moved.
    pub accounted: bool,
}

/// The space in which memory is pinned while it is flushed. Nothing is mapped there between two calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingDescription {
    /// Object number of the IOAS.
    pub ioas: u32,
    /// Object number of its page table.
    pub page_table: u32,
    /// True if the caches hold nothing of guest memory that the device has written. Else the successor flushes it all.
    pub flushed: bool,
}

/// A range of IOVAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRange {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// A mapped region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRegion {
    /// Where it is mapped.
    pub range: MappedRange,
    /// The file behind it.
    pub file: FileId,
    /// Its offset in the file.
    pub offset: u64,
    /// The device may write it.
    pub writable: bool,
}

/// Why an address space cannot be handed over, or not be accepted.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The function is in a container: `VFIO_IOMMU_MAP_DMA` maps memory of the process that calls it.
    #[error("with VFIO type1 memory stays pinned only as long as this process lives; restart the program instead")]
    Type1,
    /// There is nothing to hand over.
    #[error("the host has the device: nothing is pinned that a hand-over could keep; restart the program instead")]
    Released,
    /// Part of a region could not be unmapped before.
    #[error("{0} is only partly mapped, because unmapping it failed")]
    PartlyMapped(Span<Iova>),
    /// There is no room.
    #[error("no free IOVA range for the successor's own memory in {allowed}; {} are needed", Bytes(WINDOW.1))]
    NoWindow {
        /// The ranges that the IOMMU allows.
        allowed: String,
    },
    /// The description names something that does not exist, or contradicts itself.
    #[error("the description of the address space is wrong: {0}")]
    Description(String),
    /// The kernel does not confirm the description.
    #[error("{what}: {source}")]
    Kernel {
        /// What has been checked, or done.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// Guest memory that the session does not know.
    #[error("{0} is mapped, but the session has no such memory")]
    NotAdopted(Span<Iova>),
}

impl From<Span<Iova>> for MappedRange {
    fn from(span: Span<Iova>) -> Self {
        Self { start: span.start().raw(), len: span.len() }
    }
}

impl MappedRange {
    pub(super) fn span(self) -> Result<Span<Iova>, HandOverError> {
        let span = Span::new(Iova(self.start), self.len).filter(|span| span.start().is_aligned(page()));
        let wrong = || HandOverError::Description(format!("{:#x} bytes at {:#x} are no pages", self.len, self.start));
        span.filter(|span| span.len().is_multiple_of(page())).ok_or_else(wrong)
    }
}

impl MappedRegion {
    pub(super) fn of(region: &Region) -> Self {
        let range = region.iova().into();
        Self { range, file: region.id(), offset: region.offset(), writable: region.writable() }
    }
}

/// What a description says is mapped.
#[derive(Debug)]
pub(super) struct Inherited {
    /// Guest memory by its address.
    pub(super) regions: BTreeMap<Iova, MappedRegion>,
    /// The predecessor's buffers.
    pub(super) buffers: Vec<Span<Iova>>,
    /// Where the successor may map its own.
    pub(super) window: Span<Iova>,
    /// Every piece, as it was mapped; true if the device may write it.
    pub(super) pieces: Vec<(Span<Iova>, bool)>,
}

impl SpaceDescription {
    /// Checks that all ranges are whole pages inside one of `allowed`, and that none overlaps another.
    ///
    /// # Errors
    /// [`HandOverError::Description`].
    pub(super) fn check(&self, allowed: &[Span<Iova>]) -> Result<Inherited, HandOverError> {
        if self.regions.len().max(self.buffers.len()) > MAX_RANGES {
            return Err(wrong("it has more ranges than any front-end"));
        }
        let (mut ledger, mut pieces) = (Ledger::default(), Vec::new());
        let mut enter = |range: MappedRange| {
            let span = range.span()?;
            if !allowed.iter().any(|range| range.covers(&span)) {
                return Err(HandOverError::Description(format!("{span} is not allowed, but only {}", list(allowed))));
            }
            if let Some(taken) = ledger.conflict(span) {
                return Err(HandOverError::Description(format!("{span} overlaps {taken}")));
            }
            ledger.insert(span);
            Ok(span)
        };
        let mut regions = BTreeMap::new();
        for region in &self.regions {
            let span = enter(region.range)?;
            pieces.extend(span.chunks(CHUNK).map(|piece| (piece, region.writable)));
            regions.insert(span.start(), region.clone());
        }
        let buffers: Vec<_> = self.buffers.iter().map(|buffer| enter(*buffer)).collect::<Result<_, _>>()?;
        pieces.extend(buffers.iter().map(|span| (*span, true)));
        let window = enter(self.window)?;
        Ok(Inherited { regions, buffers, window, pieces })
    }
}

pub(super) fn wrong(what: &str) -> HandOverError {
    HandOverError::Description(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> [Span<Iova>; 2] {
        [(0, 0xfee0_0000), (0xfef0_0000, 1 << 38)].map(|(start, len)| Span::new(Iova(start), len).unwrap())
    }

    fn range(start: u64, len: u64) -> MappedRange {
        MappedRange { start, len }
    }

    /// 3 GiB of guest memory, a buffer above it, and a window.
    fn description() -> SpaceDescription {
        let file = serde_json::from_str(r#"{"device":1,"inode":2}"#).unwrap();
        let region = MappedRegion { range: range(0, 3 << 30), file, offset: 0, writable: true };
        SpaceDescription {
            device: 1,
            ioas: 2,
            page_table: 3,
            staging: None,
            regions: vec![region],
            buffers: vec![range(0x20_0000_0000, 0x1000)],
            window: range(0x10_0000_0000, 1 << 30),
            accounted: true,
        }
    }

    fn refused(description: &SpaceDescription, why: &str) {
        // A failure would print all ranges.
        let error = description.check(&allowed()).map(drop).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn a_description_keeps_the_pieces_in_which_memory_was_mapped() {
        let text = serde_json::to_string(&description()).unwrap();
        let inherited = serde_json::from_str::<SpaceDescription>(&text).unwrap().check(&allowed()).unwrap();

        let pieces: Vec<_> =
            inherited.pieces.iter().map(|(span, writable)| (span.start().0, span.len(), *writable)).collect();
        let gib = 1 << 30;
        assert_eq!(
            pieces,
            [(0, gib, true), (gib, gib, true), (2 * gib, gib, true), (0x20_0000_0000, 0x1000, true)],
            "the window is not mapped"
        );
    }

    #[test]
    fn a_range_that_is_no_whole_page_is_refused() {
        for bad in [range(0, 0), range(1, 0x1000), range(0, 0xfff), range(u64::MAX - 0xfff, 0x2000)] {
            refused(&SpaceDescription { buffers: vec![bad], ..description() }, "are no pages");
            refused(&SpaceDescription { window: bad, ..description() }, "are no pages");
        }
    }

    #[test]
    fn a_range_over_reserved_addresses_is_refused() {
        let over = range(0xfedf_f000, 0x2000);
        refused(&SpaceDescription { buffers: vec![over], ..description() }, "0xfedff000+8K is not allowed");
        refused(&SpaceDescription { window: over, ..description() }, "is not allowed");
    }

    #[test]
    fn ranges_that_overlap_are_refused() {
        let twice = SpaceDescription { regions: vec![description().regions[0].clone(); 2], ..description() };
        refused(&twice, "overlaps");
        refused(&SpaceDescription { buffers: vec![range(0x1000, 0x1000)], ..description() }, "overlaps");
        refused(&SpaceDescription { window: range(0x20_0000_0000, 0x1000), ..description() }, "overlaps");
        refused(&SpaceDescription { window: range(2 << 30, 0x1000), ..description() }, "overlaps");
    }

    #[test]
    fn more_ranges_than_any_front_end_has_are_refused() {
        let buffers = (0..=MAX_RANGES as u64).map(|n| range(0x20_0000_0000 + n * 0x1000, 0x1000)).collect();
        refused(&SpaceDescription { buffers, ..description() }, "more ranges");
    }
}
