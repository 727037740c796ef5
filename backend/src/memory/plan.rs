//! From one memory table to the next: what to take away, what to add, what to leave alone. Pure, so that the order and
//! the roll-back can be tested without a device.
//!
//! `SET_MEM_TABLE` replaces the whole table, but most of it is usually the same memory; only the difference may be
//! unmapped and mapped, because a page that stays must stay pinned (vhost-user: "Memory regions description").

use std::sync::Arc;

use super::{MemTable, Region, RegionError, RegionSpec};
use crate::addr::{Gpa, Qva, Span};

/// The difference between two tables.
pub struct Plan {
    /// In the old table only.
    pub remove: Vec<Arc<Region>>,
    /// In both: the old table's mapping is_mapping_of on.
    pub keep: Vec<Arc<Region>>,
    /// In the new table only; still to be mapped into this process.
    pub add: Vec<RegionSpec>,
}

impl Plan {
    /// To the table with one more region (`ADD_MEM_REG`). A region that is there already is left alone, so that a front-end
    /// may repeat itself.
    #[must_use]
    pub fn adding(old: &MemTable, spec: RegionSpec) -> Self {
        let known = old.regions().iter().any(|region| region.is_mapping_of(&spec));
        let add = if known { Vec::new() } else { vec![spec] };
        Self { remove: Vec::new(), keep: old.regions().to_vec(), add }
    }

    /// To the table without one region (`REM_MEM_REG`), which is named by its guest and front-end addresses and its size;
    /// `None` if there is no such region.
    #[must_use]
    pub fn removing(old: &MemTable, gpa: Span<Gpa>, qva: Qva) -> Option<Self> {
        let (remove, keep): (Vec<_>, Vec<_>) = old.regions().iter().cloned().partition(|region| region.is_announced_as(gpa, qva));
        (!remove.is_empty()).then(|| Self { remove, keep, add: Vec::new() })
    }

    /// To the announced table (`SET_MEM_TABLE`): compares what is mapped with what the front-end announces now.
    #[must_use]
    pub fn replacing(old: &MemTable, announced: Vec<RegionSpec>) -> Self {
        let mut keep = Vec::new();
        let mut add = Vec::new();
        for spec in announced {
            match old.regions().iter().find(|region| region.is_mapping_of(&spec)) {
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
