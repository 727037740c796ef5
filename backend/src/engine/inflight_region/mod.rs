//! The record of a ring's requests in flight, in memory that outlives this process (vhost-user: "Inflight I/O tracking").
//!
//! The front-end keeps the memory and returns it to the process that serves the ring next. The two halves of each layout are
//! the marks, which the data path writes, and the recovery, which reads them: a pure function of the record and the ring.
//!
//! ```text
//!  take ───▶ marked ───▶ (device) ───▶ pushed ───▶ published ───▶ unmarked
//!            └─ after a crash: submitted again ─┘└──── never again ────┘
//! ```
//! The order of the stores is all that a crash of the process needs, because its stores remain. So no step needs a fence. The
//! front-end may write the record at any time: recovery reads each value once and checks it, and nothing else reads it.

mod contradiction;
pub(in crate::engine) mod packed;
mod packed_layout;
mod packed_list;
pub mod packed_recovery;
mod recorded;
pub(in crate::engine) mod split;
pub mod split_recovery;

pub use contradiction::{Claim, Contradiction};
pub use recorded::Recorded;

use super::virtqueue::layout::Layout;
use crate::sys::SharedMemory;

/// The version of an initialized record; 0 is one that has never been used.
const VERSION: u16 = 1;

/// Offset of the version, with either layout.
const VERSION_AT: usize = 8;

/// A counter above this cannot have been reached by counting.
const MAX_COUNTER: u64 = 1 << 62;

/// The record of one ring.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    memory: SharedMemory,
    entries: u16,
}

/// What a ring found in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// The ring keeps its record. So many requests were in flight, and are submitted again.
    On {
        /// Number of requests.
        recovered: usize,
    },
    /// The record is new, and the ring is not: requests that nobody has recorded may be in flight. It is not used.
    Off,
}

impl InflightRegion {
    /// Size of the record of a ring, bytes. `entries` is its number of descriptors.
    #[must_use]
    pub fn bytes(layout: Layout, entries: u16) -> usize {
        match layout {
            Layout::Split => split::HEADER + split::ENTRY * usize::from(entries),
            Layout::Packed => packed_layout::HEADER + packed_layout::ENTRY * usize::from(entries),
        }
    }

    /// A record for rings of up to `entries` descriptors. `None` if `memory` is too small or not aligned to 8 bytes.
    #[must_use]
    pub fn new(memory: SharedMemory, layout: Layout, entries: u16) -> Option<Self> {
        let memory = memory.slice(0, Self::bytes(layout, entries))?;
        memory.array::<u64, 1>(0, 1)?;
        Some(Self { memory, entries })
    }

    /// Makes the record one that has never been used, for a ring that starts at a base which is known to be right. Nothing may be
    /// in flight.
    pub fn retire(&self) {
        self.memory.write_u16(VERSION_AT, 0);
    }

    /// Longest ring, descriptors.
    #[must_use]
    pub fn entries(&self) -> u16 {
        self.entries
    }
}

/// Sorts requests by their counters. Returns them and the next counter.
fn in_order<R>(mut requests: Vec<(u64, R)>, entry: impl Fn(&R) -> u16) -> Result<(Vec<R>, u64), Contradiction> {
    requests.sort_unstable_by_key(|(counter, _)| *counter);
    let mut next_counter = 0;
    for (counter, request) in &requests {
        if *counter < next_counter || *counter > MAX_COUNTER {
            return Err(Claim::Counter { entry: entry(request), counter: *counter }.into());
        }
        next_counter = counter + 1;
    }
    Ok((requests.into_iter().map(|(_, request)| request).collect(), next_counter))
}

#[cfg(test)]
mod tests;
