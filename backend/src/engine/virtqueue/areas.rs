//! Look-up of a virtqueue's three areas in guest memory.

use super::layout::Area;
use crate::addr::{Address, Gpa, Span};
use crate::engine::error::EngineError;
use crate::engine::setup::VringSetup;
use crate::memory::MemTable;
use crate::sys::SharedMemory;

/// Finds the areas of a ring in guest memory. Each must be aligned and lie in one region.
pub(in crate::engine) fn map_areas(setup: &VringSetup, table: &MemTable) -> Result<[SharedMemory; 3], EngineError> {
    let [desc, driver, device] = setup.layout.areas(setup.size, setup.event_idx);
    let find = |area, span| shared(setup.index, area, span, table);
    Ok([find(desc, setup.desc)?, find(driver, setup.avail)?, find(device, setup.used)?])
}

fn shared(index: usize, area: Area, span: Span<Gpa>, table: &MemTable) -> Result<SharedMemory, EngineError> {
    let Area { name, bytes, alignment } = area;
    let refused = || EngineError::RingArea { index, name, span, bytes, alignment };
    let exact = span.slice(0, bytes).filter(|span| span.start().is_aligned(alignment)).ok_or_else(refused)?;
    let (shared, offset) = table.host_memory(exact, &mut 0).ok_or_else(refused)?;
    let len = usize::try_from(bytes).map_err(|_| refused())?;
    shared.slice(offset, len).ok_or_else(refused)
}
