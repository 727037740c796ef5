//! Carries a change of guest memory through: this process, the device's address space, the data path. Every change, be it
//! one region more, one less or a new table, is a [`Plan`], and takes one road:
//!
//! ```text
//!  map in this process ─▶ withdraw ─▶ remove from device ─▶ add to device ─▶ publish ─▶ (the caller acknowledges)
//!       any mistake of the front-end ends it here    └── a failure from here on undoes what has been done ──┘
//! ```
//!
//! Removing comes before adding, because a new region may take the place of an old one, and because both together may be
//! more than the user may lock. Regions in both tables are not touched, so requests to them go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Error;
use super::error::MAX_SLOTS;
use crate::addr::{Bytes, Gpa, Span};
use crate::engine::Engine;
use crate::hardware::{AddressSpace, MapError};
use crate::memory::{MemTable, Plan, Region, RegionSpec};

/// Mapping that takes longer than this deserves advice.
const SLOW: Duration = Duration::from_secs(1);
const FASTER: &str = "prealloc=on lets QEMU touch its memory before, and hugetlb=on makes fewer pages of it";

/// The memory of the present front-end.
pub(super) struct GuestMemory<'d> {
    engine: &'d Engine,
    space: &'d dyn AddressSpace,
    table: Arc<MemTable>,
}

/// One change of the device's address space.
enum Step {
    Removed(Arc<Region>),
    Added(Arc<Region>),
}

impl<'d> GuestMemory<'d> {
    pub(super) fn new(engine: &'d Engine, space: &'d dyn AddressSpace) -> Self {
        Self { engine, space, table: Arc::default() }
    }

    pub(super) fn table(&self) -> &MemTable {
        &self.table
    }

    /// Applies `plan`. Rings in [`Plan::remove`] have been stopped.
    ///
    /// # Errors
    /// Memory is as it was before, except after [`Error::NotUndone`].
    pub(super) fn apply(&mut self, mut plan: Plan) -> Result<(), Error> {
        let added = std::mem::take(&mut plan.add).into_iter().map(map).collect::<Result<Vec<_>, _>>()?;
        let table = Arc::new(plan.table(&added)?);
        if table.regions().len() > MAX_SLOTS {
            return Err(Error::TooManyRegions(table.regions().len()));
        }
        let mut done = Vec::new();
        match self.change(&plan, &added, &mut done) {
            Ok(()) => self.publish(table),
            Err(failed) => return Err(self.undo(done, failed)),
        }
        Ok(())
    }

    fn publish(&mut self, table: Arc<MemTable>) {
        self.engine.publish(Arc::clone(&table));
        self.table = table;
    }

    fn change(&self, plan: &Plan, added: &[Arc<Region>], done: &mut Vec<Step>) -> Result<(), Error> {
        if !plan.remove.is_empty() {
            let gone: Vec<Span<Gpa>> = plan.remove.iter().map(|region| region.gpa()).collect();
            self.engine.withdraw(Arc::new(plan.table(&[])?), &gone)?;
        }
        for region in &plan.remove {
            self.unmap(region)?;
            log::info!("region {} unmapped; {} KiB in all", region.gpa(), self.kib());
            done.push(Step::Removed(Arc::clone(region)));
        }
        for region in added {
            let start = Instant::now();
            self.space.add(region)?;
            let took = start.elapsed();
            log::info!("region {} mapped in {} ms; {} KiB in all", describe(region), took.as_millis(), self.kib());
            if took >= SLOW {
                log::warn!("the guest stood still for {} s of mapping; {FASTER}", took.as_secs());
            }
            done.push(Step::Added(Arc::clone(region)));
        }
        Ok(())
    }

    /// How much is mapped for the device, and so pinned.
    fn kib(&self) -> u64 {
        self.space.statistics().mapped / 1024
    }

    /// Takes `region` away from the device, in whatever way there is memory for.
    fn unmap(&self, region: &Region) -> Result<(), MapError> {
        match self.space.remove(region) {
            Err(must_be_idle @ MapError::DeviceMustBeIdle { .. }) => {
                let removed = self.engine.while_idle(|| self.space.remove_while_idle(region));
                removed.unwrap_or_else(|error| {
                    log::error!("{error}");
                    Err(must_be_idle)
                })
            }
            other => other,
        }
    }

    /// Takes back what has been done, last step first, and publishes what is there then: the old table, if all went well.
    fn undo(&mut self, done: Vec<Step>, failed: Error) -> Error {
        let mut lost = Vec::new();
        let mut trouble: Option<MapError> = None;
        for step in done.into_iter().rev() {
            let undone = match &step {
                Step::Added(region) => self.unmap(region),
                Step::Removed(region) => self.space.add(region).inspect_err(|_| lost.push(Arc::clone(region))),
            };
            trouble = undone.err().or(trouble);
        }
        let is_lost = |region: &Arc<Region>| lost.iter().any(|other| Arc::ptr_eq(other, region));
        let left = self.table.regions().iter().filter(|region| !is_lost(region)).cloned().collect();
        let table = MemTable::new(left).expect("part of a valid table");
        self.publish(Arc::new(table));
        match trouble {
            None => failed,
            Some(undo) => Error::NotUndone {
                failed: Box::new(failed),
                undo,
                lost: lost.iter().map(|region| region.gpa().len()).sum(),
            },
        }
    }

    /// Takes all memory away, whatever happens on the way; the front-end has gone, and nothing may stay pinned for it.
    /// Rings have been stopped.
    ///
    /// # Errors
    /// The data path is broken; what its device may still do, the IOMMU stops.
    pub(super) fn release(&mut self) -> Result<(), Error> {
        let table = std::mem::take(&mut self.table);
        if table.is_empty() {
            return Ok(());
        }
        let gone: Vec<Span<Gpa>> = table.regions().iter().map(|region| region.gpa()).collect();
        let withdrawn = self.engine.withdraw(Arc::default(), &gone);
        for region in table.regions() {
            match self.unmap(region) {
                Ok(()) => log::info!("region {} unmapped; {} KiB in all", region.gpa(), self.kib()),
                Err(error) => log::error!("region {} stays mapped: {error}", region.gpa()),
            }
        }
        Ok(withdrawn?)
    }
}

fn map(spec: RegionSpec) -> Result<Arc<Region>, Error> {
    Ok(Arc::new(Region::map(spec)?))
}

fn describe(region: &Region) -> String {
    let (id, offset, page) = (region.id(), region.offset(), Bytes(region.page_size()));
    let sealed = if region.sealed_against_shrinking() { "" } else { " not sealed" };
    format!("{} fd ({id}) offset {offset:#x} pages {page}{sealed}", region.gpa())
}
