//! Applies changes of guest memory to this process, the device's address space and the data path. Each change (a region
//! added, a region removed, a new table) is a [`Plan`] with the same steps:
//!
//! ```text
//!  map in this process ─▶ remove from workers ─▶ remove from device ─▶ add to device ─▶ publish ─▶ (the caller acknowledges)
//!    invalid regions are refused here   └── a failure from here on undoes the steps before ──┘
//! ```
//!
//! Regions are removed before others are added: a new region may overlap an old one, and both together may exceed the limit
//! of locked memory. Regions in both tables are not touched, so requests to them continue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::MAX_SLOTS;
use super::{Device, Error};
use crate::addr::{Bytes, Gpa, IovaSlice, Span};
use crate::engine::Engine;
use crate::hardware::{AddressSpace, MapError};
use crate::memory::{MemTable, Plan, Region, RegionSpec};
use crate::rate_limited_log::SharedLog;

/// A mapping that takes longer is logged, with [`FASTER`] as advice.
const SLOW: Duration = Duration::from_secs(1);
const FASTER: &str = "prealloc=on lets QEMU touch its memory before, and hugetlb=on makes fewer pages of it";

/// The memory of the current front-end.
pub(super) struct GuestMemory<'d> {
    engine: &'d Engine,
    /// That of the device, or the second one while another front-end is served.
    space: Arc<dyn AddressSpace>,
    /// The workers use this memory, and no other.
    published: bool,
    slice: IovaSlice,
    log: &'d SharedLog,
    table: Arc<MemTable>,
}

/// One change of the device's address space.
enum Step {
    Removed(Arc<Region>),
    Added(Arc<Region>),
}

impl<'d> GuestMemory<'d> {
    pub(super) fn new(device: &'d Device, log: &'d SharedLog) -> Self {
        Self::mapped_in(Arc::clone(&device.space), device, log)
    }

    /// The memory of a front-end that waits while another is served. It is mapped in `second`.
    pub(super) fn of_next(second: Arc<dyn AddressSpace>, device: &'d Device, log: &'d SharedLog) -> Self {
        Self { published: false, ..Self::mapped_in(second, device, log) }
    }

    fn mapped_in(space: Arc<dyn AddressSpace>, device: &'d Device, log: &'d SharedLog) -> Self {
        let Device { engine, slice, .. } = device;
        Self { engine, space, published: true, slice: *slice, log, table: Arc::default() }
    }

    fn map(&self, spec: RegionSpec) -> Result<Arc<Region>, Error> {
        Ok(Arc::new(Region::map_in(spec, self.slice)?))
    }

    pub(super) fn table(&self) -> &MemTable {
        &self.table
    }

    /// Applies `plan`. Vrings in [`Plan::remove`] have been stopped.
    ///
    /// # Errors
    /// Memory is unchanged, except after [`Error::NotUndone`].
    pub(super) fn apply(&mut self, mut plan: Plan) -> Result<(), Error> {
        let added =
            std::mem::take(&mut plan.add).into_iter().map(|spec| self.map(spec)).collect::<Result<Vec<_>, _>>()?;
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

    /// Takes the memory over of a process that has handed its session over. `inodes` are those of the files it had.
    ///
    /// # Errors
    /// The memory is not what that process had, or is not mapped for the device.
    pub(super) fn inherit(&mut self, specs: Vec<RegionSpec>, inodes: impl Iterator<Item = u64>) -> Result<(), Error> {
        let regions = specs.into_iter().map(|spec| self.map(spec)).collect::<Result<Vec<_>, _>>()?;
        for (region, inode) in regions.iter().zip(inodes) {
            if region.id().inode() != inode {
                return Err(Error::OtherFile { gpa: region.gpa(), found: region.id(), inode });
            }
            self.space.inherit(region)?;
        }
        let table = Arc::new(MemTable::new(regions)?);
        if table.regions().len() > MAX_SLOTS {
            return Err(Error::TooManyRegions(table.regions().len()));
        }
        self.log.info(|| format!("{} regions taken over; {} KiB in all", table.regions().len(), self.kib()));
        self.publish(table);
        Ok(())
    }

    fn publish(&mut self, table: Arc<MemTable>) {
        if self.published {
            self.engine.publish(Arc::clone(&table));
        }
        self.table = table;
    }

    fn remove_from_workers(&self, table: Arc<MemTable>, removed: &[Span<Gpa>]) -> Result<(), Error> {
        if self.published { Ok(self.engine.remove_memory(table, removed)?) } else { Ok(()) }
    }

    /// Lets `next`, which is mapped in the space `second`, be what the device uses instead of this memory. `exchange` exchanges the
    /// two spaces. The device must be idle, and no ring may run.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(super) fn give_way(
        &mut self,
        next: &mut Self,
        exchange: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let all: Vec<Span<Gpa>> = self.table.regions().iter().map(|region| region.gpa()).collect();
        self.remove_from_workers(Arc::default(), &all)?;
        if let Err(error) = exchange() {
            self.publish(Arc::clone(&self.table));
            return Err(error);
        }
        std::mem::swap(&mut self.space, &mut next.space);
        std::mem::swap(&mut self.published, &mut next.published);
        next.publish(Arc::clone(&next.table));
        Ok(())
    }

    fn change(&self, plan: &Plan, added: &[Arc<Region>], done: &mut Vec<Step>) -> Result<(), Error> {
        if !plan.remove.is_empty() {
            let removed: Vec<Span<Gpa>> = plan.remove.iter().map(|region| region.gpa()).collect();
            self.remove_from_workers(Arc::new(plan.table(&[])?), &removed)?;
        }
        for region in &plan.remove {
            self.unmap(region)?;
            self.log.info(|| format!("region {} unmapped; {} KiB in all", region.gpa(), self.kib()));
            done.push(Step::Removed(Arc::clone(region)));
        }
        for region in added {
            let start = Instant::now();
            self.space.add(region)?;
            let took = start.elapsed();
            let (region_text, ms) = (describe(region), took.as_millis());
            self.log.info(|| format!("region {region_text} mapped in {ms} ms; {} KiB in all", self.kib()));
            if took >= SLOW {
                self.log.warn(|| format!("mapping blocked the guest for {} s; {FASTER}", took.as_secs()));
            }
            done.push(Step::Added(Arc::clone(region)));
        }
        Ok(())
    }

    /// Size of the memory that is mapped for the device, KiB.
    fn kib(&self) -> u64 {
        self.space.statistics().mapped / 1024
    }

    /// Unmaps `region` from the device. If the kernel lacks the memory to do that while the device runs, unmaps it while the
    /// device is idle.
    fn unmap(&self, region: &Region) -> Result<(), MapError> {
        match self.space.remove(region) {
            Err(must_be_idle @ MapError::DeviceMustBeIdle { .. }) => {
                let removed = self.engine.while_idle(|| self.space.remove_while_idle(region));
                removed.unwrap_or_else(|error| {
                    self.log.error(|| error.to_string());
                    Err(must_be_idle)
                })
            }
            other => other,
        }
    }

    /// Undoes the steps in `done`, in reverse order, and publishes the old table without the regions that could not be mapped
    /// again.
    fn undo(&mut self, done: Vec<Step>, failed: Error) -> Error {
        let mut lost = Vec::new();
        let mut undo_error: Option<MapError> = None;
        for step in done.into_iter().rev() {
            let undone = match &step {
                Step::Added(region) => self.unmap(region),
                Step::Removed(region) => self.space.add(region).inspect_err(|_| lost.push(Arc::clone(region))),
            };
            undo_error = undone.err().or(undo_error);
        }
        let is_lost = |region: &Arc<Region>| lost.iter().any(|other| Arc::ptr_eq(other, region));
        let left = self.table.regions().iter().filter(|region| !is_lost(region)).cloned().collect();
        let table = MemTable::new(left).expect("part of a valid table");
        self.publish(Arc::new(table));
        match undo_error {
            None => failed,
            Some(undo) => Error::NotUndone {
                failed: Box::new(failed),
                undo,
                lost: lost.iter().map(|region| region.gpa().len()).sum(),
            },
        }
    }

    /// Unmaps all memory after the front-end has disconnected and its vrings have been stopped. After an error it continues
    /// with the next region.
    ///
    /// # Errors
    /// The data path has failed. The IOMMU stops any DMA that its device may still do.
    pub(super) fn release(&mut self) -> Result<(), Error> {
        let table = std::mem::take(&mut self.table);
        if table.is_empty() {
            return Ok(());
        }
        let removed: Vec<Span<Gpa>> = table.regions().iter().map(|region| region.gpa()).collect();
        let drained = self.remove_from_workers(Arc::default(), &removed);
        for region in table.regions() {
            match self.unmap(region) {
                Ok(()) => self.log.info(|| format!("region {} unmapped; {} KiB in all", region.gpa(), self.kib())),
                Err(error) => self.log.error(|| format!("region {} stays mapped: {error}", region.gpa())),
            }
        }
        drained
    }
}

fn describe(region: &Region) -> String {
    let (id, offset, page) = (region.id(), region.offset(), Bytes(region.page_size()));
    let sealed = if region.sealed_against_shrinking() { "" } else { " not sealed" };
    format!("{} fd ({id}) offset {offset:#x} pages {page}{sealed}", region.gpa())
}
