//! The steps from one memory table to the next: regions to remove, to keep and to add. A plan has no side effects, so order
//! and rollback can be tested without a device.
//!
//! `SET_MEM_TABLE` replaces the whole table, but most regions usually stay. Only the difference may be unmapped and mapped: a
//! page that stays must remain pinned (vhost-user: "Memory regions description").

use std::sync::Arc;

use super::{MemTable, Region, RegionError, RegionSpec};
use crate::addr::{Gpa, Qva, Span};

/// The difference between two tables.
pub struct Plan {
    /// Regions of the old table only.
    pub remove: Vec<Arc<Region>>,
    /// Regions of both tables; their mappings stay.
    pub keep: Vec<Arc<Region>>,
    /// Regions of the new table only, not yet mapped into this process.
    pub add: Vec<RegionSpec>,
}

impl Plan {
    /// Adds one region (`ADD_MEM_REG`). Adding a region that exists already changes nothing, so a front-end may repeat the
    /// message.
    #[must_use]
    pub fn adding(old: &MemTable, spec: RegionSpec) -> Self {
        let exists = old.regions().iter().any(|region| region.is_mapping_of(&spec));
        let add = if exists { Vec::new() } else { vec![spec] };
        Self { remove: Vec::new(), keep: old.regions().to_vec(), add }
    }

    /// Removes one region (`REM_MEM_REG`), identified by guest physical address, size and front-end address. `None` if there
    /// is no such region.
    #[must_use]
    pub fn removing(old: &MemTable, gpa: Span<Gpa>, qva: Qva) -> Option<Self> {
        let (remove, keep): (Vec<_>, Vec<_>) =
            old.regions().iter().cloned().partition(|region| region.is_announced_as(gpa, qva));
        (!remove.is_empty()).then(|| Self { remove, keep, add: Vec::new() })
    }

    /// Replaces the table (`SET_MEM_TABLE`): compares the mapped regions with the announced ones.
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

    /// The new table. `added` are the regions mapped from [`Self::add`].
    ///
    /// # Errors
    /// See [`MemTable::new`].
    pub fn table(&self, added: &[Arc<Region>]) -> Result<MemTable, RegionError> {
        MemTable::new(self.keep.iter().chain(added).cloned().collect())
    }
}
