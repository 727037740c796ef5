//! The regions of a function except configuration space: BARs and the expansion ROM, and which parts of a BAR the virtual
//! machine monitor may map.

use std::collections::BTreeSet;

use crate::whole_function::{CONFIG_REGION, REGIONS, RegionInfo, RegionMmap, WholeFunction};

use super::PassthroughError;
use super::logs::Logs;

/// `--bars`: how the guest reaches the registers of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BarAccess {
    /// Mapped into the guest: loads and stores go straight to the device.
    #[default]
    Direct,
    /// One message for each load and store; the virtual machine monitor gets no descriptor of the device.
    Trapped,
}

/// See the top of this file.
pub(crate) struct Regions<'d> {
    function: &'d dyn WholeFunction,
    bars: BarAccess,
    logs: &'d Logs,
    /// Regions whose descriptor has been given to the virtual machine monitor, and logged.
    given: BTreeSet<u32>,
}

impl<'d> Regions<'d> {
    pub(super) fn new(function: &'d dyn WholeFunction, bars: BarAccess, logs: &'d Logs) -> Self {
        Self { function, bars, logs, given: BTreeSet::new() }
    }

    /// Size and access of a region; all zero if the function does not have it.
    pub(crate) fn info(&self, index: u32) -> RegionInfo {
        if index < REGIONS { self.function.region(index) } else { RegionInfo::default() }
    }

    /// The descriptor with which the virtual machine monitor can map region `index`; `None` if it may not.
    pub(crate) fn mmap(&mut self, index: u32) -> Result<Option<RegionMmap>, PassthroughError> {
        if self.bars == BarAccess::Trapped || index >= CONFIG_REGION {
            return Ok(None);
        }
        let mmap = self.function.region_mmap(index);
        let mmap = mmap.map_err(PassthroughError::function(self.function, "hand a BAR to the front-end"))?;
        if let Some(RegionMmap { rights, areas, .. }) = &mmap
            && self.given.insert(index)
        {
            let parts =
                if areas.is_empty() { "all of it".to_owned() } else { format!("{} part(s) of it", areas.len()) };
            let name = self.function.name();
            let line = || format!("{name}: BAR {index}: the front-end may map {parts}; it was given {rights}");
            self.logs.grants.info(line);
        }
        Ok(mmap)
    }

    /// Reads a region at `offset`, bytes.
    pub(crate) fn read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> Result<(), PassthroughError> {
        self.check(index, offset, bytes.len())?;
        let read = self.function.region_read(index, offset, bytes);
        read.map_err(PassthroughError::function(self.function, "read a BAR"))
    }

    /// Writes a region at `offset`, bytes.
    pub(crate) fn write(&self, index: u32, offset: u64, bytes: &[u8]) -> Result<(), PassthroughError> {
        self.check(index, offset, bytes.len())?;
        let written = self.function.region_write(index, offset, bytes);
        written.map_err(PassthroughError::function(self.function, "write a BAR"))
    }

    /// Checks that an access lies inside the region.
    pub(crate) fn check(&self, index: u32, offset: u64, count: usize) -> Result<(), PassthroughError> {
        let size = self.info(index).size;
        let end = offset.checked_add(count as u64);
        if count != 0 && end.is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(PassthroughError::Region { index, offset, count, size })
    }
}
