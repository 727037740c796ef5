//! The device's address space on a container of VFIO (IOMMU type 1). Memory is mapped by its address in this process. There is
//! one address space, and no staging space: under a flushing verdict memory is flushed after it is mapped (FlushAfterMap in
//! `sequence.rs`).
//!
//! The kernel removes all mappings when the device's group leaves the container. So while the device is released nothing is
//! mapped, and this space remembers what was. When the device is back, in another container, all of it is mapped there.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::sequence::{Piece, Space, Steps};
use super::{CHUNK, MappedMemory, buffer, check_free, explain, flush, whole};
use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, CacheFlush, DmaBuffer, MapError, SecondSpace, SpaceStatistics};
use crate::memory::Region;
use crate::sys::{CacheLines, Container, SharedMemory};

/// The address space of one device. Its buffers keep it alive.
#[derive(Clone)]
pub struct Type1Space(Arc<Inner>);

struct Inner {
    /// `Some` if the device's DMA may bypass the CPU caches.
    lines: Option<CacheLines>,
    mapped: MappedMemory,
    /// Held across each map and unmap, so neither runs while the device is released or comes back.
    state: Mutex<State>,
}

struct State {
    /// `None` while the device is released.
    container: Option<Arc<Container>>,
    /// The ranges that the IOMMU allows; while the device is released, those that it allowed.
    ranges: Vec<Span<Iova>>,
    /// All mapped memory.
    mappings: BTreeMap<Iova, Mapping>,
}

struct Mapping {
    span: Span<Iova>,
    shared: SharedMemory,
    writable: bool,
}

/// The steps on one container. `None` while the device is released: nothing is mapped then, but remembered.
struct OnContainer<'a> {
    container: Option<&'a Container>,
    lines: Option<CacheLines>,
}

impl Type1Space {
    /// For the device in `container`, which is enabled and empty. With `lines` memory is flushed, because the device's DMA may
    /// bypass the CPU caches.
    ///
    /// # Errors
    /// The errno of reading the allowed ranges.
    pub fn new(container: Container, lines: Option<CacheLines>) -> io::Result<Self> {
        let ranges = container.info()?.ranges;
        let mapped = MappedMemory::without_staging(lines.is_some(), CHUNK);
        let state = State { container: Some(Arc::new(container)), ranges, mappings: BTreeMap::new() };
        Ok(Self(Arc::new(Inner { lines, mapped, state: Mutex::new(state) })))
    }

    /// Takes a device that is back, in `container`, which is enabled and empty. The device does no DMA yet. On failure it must be
    /// closed, and the space stays released.
    ///
    /// # Errors
    /// The errno of the step that failed, or that memory cannot be flushed.
    pub fn rejoin(&self, container: Container) -> io::Result<()> {
        let mut state = self.0.state();
        let info = container.info()?;
        for Mapping { span, shared, writable } in state.mappings.values() {
            let whole = Piece { span: *span, shared, offset: 0, file: None, writable: *writable };
            for span in span.chunks(CHUNK) {
                container.map((shared, whole.part(span).offset), span, *writable)?;
            }
            if let Some(lines) = &self.0.lines {
                flush(lines, shared, 0, shared.len());
                if shared.lost_pages() != 0 {
                    return Err(io::Error::other("the front-end has truncated its memory, so it cannot be flushed"));
                }
            }
        }
        state.ranges = info.ranges;
        state.container = Some(Arc::new(container));
        Ok(())
    }

    /// The order of the steps by which memory is mapped, as text.
    #[must_use]
    pub fn order(&self) -> &'static str {
        self.0.mapped.order()
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `steps` on the container.
    fn on<T>(&self, state: &State, steps: impl FnOnce(&dyn Steps) -> T) -> T {
        steps(&OnContainer { container: state.container.as_deref(), lines: self.lines })
    }

    /// Maps `whole`, and remembers it.
    fn add(&self, state: &mut State, whole: Piece<'_>) -> Result<(), MapError> {
        check_limit(state.container.as_deref(), whole.span)?;
        let added = self.on(state, |steps| self.mapped.add(steps, whole));
        added.map_err(|(span, failed)| explain(&self.mapped, "this process", span, failed))?;
        let mapping = Mapping { span: whole.span, shared: whole.shared.clone(), writable: whole.writable };
        state.mappings.insert(whole.span.start(), mapping);
        Ok(())
    }

    fn remove(&self, whole: Piece<'_>) -> Result<(), MapError> {
        let mut state = self.state();
        self.on(&state, |steps| self.mapped.remove(steps, whole))?;
        state.mappings.remove(&whole.span.start());
        Ok(())
    }
}

/// Fails if the kernel allows fewer mappings than `span` needs, before any of it is mapped.
fn check_limit(container: Option<&Container>, span: Span<Iova>) -> Result<(), MapError> {
    let needed = span.chunks(CHUNK).count() as u64;
    let info = container.and_then(|container| container.info().ok());
    match info.and_then(|info| info.mappings_left) {
        Some(left) if u64::from(left) < needed => Err(MapError::TooManyMappings { span, needed, left }),
        _ => Ok(()),
    }
}

impl Steps for OnContainer<'_> {
    fn map(&self, space: Space, piece: Piece<'_>) -> io::Result<()> {
        let Piece { span, shared, offset, writable, .. } = piece;
        match (space, self.container) {
            (Space::Staging, _) => Err(io::Error::from_raw_os_error(libc::ENODEV)),
            (Space::Live, Some(container)) => container.map((shared, offset), span, writable),
            (Space::Live, None) => Ok(()),
        }
    }

    fn copy(&self, _: Space, _: Space, _: Piece<'_>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn unmap(&self, _: Space, span: Span<Iova>) -> io::Result<()> {
        self.container.map_or(Ok(()), |container| container.unmap(span))
    }

    fn flush(&self, piece: Piece<'_>) {
        let lines = self.lines.as_ref().expect("only a flushing regime flushes");
        flush(lines, piece.shared, piece.offset, piece.bytes());
    }

    fn detach(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn attach(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }
}

impl AddressSpace for Type1Space {
    fn allowed(&self) -> Result<Vec<Span<Iova>>, MapError> {
        Ok(self.0.state().ranges.clone())
    }

    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        let (inner, whole) = (&*self.0, whole(region));
        let mut state = inner.state();
        check_free(&inner.mapped, &state.ranges, whole.span)?;
        inner.add(&mut state, whole)
    }

    fn remove(&self, region: &Region) -> Result<(), MapError> {
        self.0.remove(whole(region))
    }

    fn second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        let why = "VFIO type1 has one page table for a container, and a function cannot change it while it is open; serve with \
                   --iommu iommufd";
        Err(MapError::NoSecondSpace { why: why.into() })
    }

    fn require_flush_before_map(&self) {
        self.0.mapped.require_flush_before_map();
    }

    fn release(&self) {
        let mut state = self.0.state();
        if let Some(lines) = &self.0.lines {
            state.mappings.values().for_each(|mapping| flush(lines, &mapping.shared, 0, mapping.shared.len()));
        }
        // Its mappings last until the device is closed, too.
        state.container = None;
    }

    fn is_released(&self) -> bool {
        self.0.state().container.is_none()
    }

    fn statistics(&self) -> SpaceStatistics {
        self.0.mapped.statistics()
    }

    fn pins(&self) -> bool {
        true
    }

    fn caches(&self) -> Option<Arc<dyn CacheFlush>> {
        Some(Arc::new(self.0.lines?))
    }

    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let inner = &*self.0;
        let (_, shared) = buffer::memory(bytes)?;
        let mut state = inner.state();
        let span = buffer::gap(&[&inner.mapped], &state.ranges, shared.len() as u64).ok_or(MapError::NoIova(bytes))?;
        inner.add(&mut state, Piece { span, shared: &shared, offset: 0, file: None, writable: true })?;
        let mapping = BufferMapping { space: Arc::clone(&self.0), span, shared: shared.clone() };
        Ok(DmaBuffer::new(shared, span, Box::new(mapping)))
    }
}

/// A buffer's mapping, unmapped on drop. The device no longer uses the buffer then.
struct BufferMapping {
    space: Arc<Inner>,
    span: Span<Iova>,
    shared: SharedMemory,
}

impl Drop for BufferMapping {
    fn drop(&mut self) {
        let whole = Piece { span: self.span, shared: &self.shared, offset: 0, file: None, writable: true };
        if let Err(error) = self.space.remove(whole) {
            log::error!("{error}");
        }
    }
}
