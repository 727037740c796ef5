//! From one memory table to the next: what to take away, what to add, what to leave alone. Pure, so that the order and
//! the roll-back can be tested without a device.
//!
//! `SET_MEM_TABLE` replaces the whole table, but most of it is usually the same memory; only the difference may be
//! unmapped and mapped, because a page that stays must stay pinned (vhost-user: "Memory regions description").

use std::sync::Arc;

use super::{MemTable, Region, RegionError, RegionSpec};

/// The difference between two tables.
pub struct Plan {
    /// In the old table only.
    pub remove: Vec<Arc<Region>>,
    /// In both: the old table's mapping serves on.
    pub keep: Vec<Arc<Region>>,
    /// In the new table only; still to be mapped into this process.
    pub add: Vec<RegionSpec>,
}

impl Plan {
    /// Compares what is mapped with what the front-end announces now.
    #[must_use]
    pub fn new(old: &MemTable, announced: Vec<RegionSpec>) -> Self {
        let mut keep = Vec::new();
        let mut add = Vec::new();
        for spec in announced {
            match old.regions().iter().find(|region| region.serves(&spec)) {
                Some(region) => keep.push(Arc::clone(region)),
                None => add.push(spec),
            }
        }
        let kept = |region: &Arc<Region>| keep.iter().any(|other| Arc::ptr_eq(other, region));
        let remove = old.regions().iter().filter(|region| !kept(region)).cloned().collect();
        Self { remove, keep, add }
    }

    /// The table after the change, given the regions made from [`Self::add`].
    ///
    /// # Errors
    /// See [`MemTable::new`].
    pub fn table(&self, added: &[Arc<Region>]) -> Result<MemTable, RegionError> {
        MemTable::new(self.keep.iter().chain(added).cloned().collect())
    }
}
