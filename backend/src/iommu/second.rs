//! A second IOAS with a page table of its own, for the memory of the virtual machine that comes next.
//!
//! ```text
//! start     allocate IOAS, page table, staging space ── copy the driver's buffers: their pins are shared
//! add       as in the first space, while the device is attached to that; memory that is mapped there already is borrowed
//! exchange  (the device is idle) VFIO_DEVICE_ATTACH_IOMMUFD_PT replaces the page table ── both sides exchange what they own
//! remove    what the device used before ── destroy page table, IOAS
//! ```
//!
//! Without a second mapping there is nothing to replace: `borrowed.rs`.
//!
//! An attach of an attached device replaces its page table: until it returns without an error, the former one counts
//! (`include/uapi/linux/vfio.h`). Some IOMMU drivers block all DMA in between, which an idle device does not notice.
//!
//! The device has reserved ranges that narrow an IOAS only when it is attached. So the second space allows what the first does.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::borrowed::Borrowed;
use super::hand_over_state::HandOver;
use super::mapped_memory::{CHUNK, MappedMemory};
use super::page_table::PageTable;
use super::sequence::{Piece, Space};
use super::staging::Staging;
use super::{Attachment, Live, LiveSpace};
use crate::addr::{Iova, Span};
use crate::hardware::{AddressSpace, MapError, SecondSpace};
use crate::sys::{DeviceId, Owner};

/// How two spaces of one device know each other.
#[derive(Default)]
pub(super) struct Twin {
    /// In the first space. The lock is held while a buffer is mapped or unmapped in both.
    second: Mutex<Weak<Live>>,
    /// In the second space.
    first: Option<Arc<Live>>,
    /// In the second space: its page table. `None` while the device is released, because it would keep memory pinned.
    table: Mutex<Option<Arc<PageTable>>>,
    /// In the second space: what it borrows from the first.
    borrowed: Mutex<Borrowed>,
}

/// The second space, which neither comes nor goes as long as this exists.
pub(super) struct SecondGuard<'a> {
    live: Option<Arc<Live>>,
    _slot: MutexGuard<'a, Weak<Live>>,
}

impl Twin {
    pub(super) fn first(&self) -> Option<&Arc<Live>> {
        self.first.as_ref()
    }

    pub(super) fn second(&self) -> SecondGuard<'_> {
        let slot = self.second.lock().unwrap_or_else(PoisonError::into_inner);
        SecondGuard { live: slot.upgrade(), _slot: slot }
    }

    pub(super) fn borrowed(&self) -> MutexGuard<'_, Borrowed> {
        self.borrowed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Option<Arc<PageTable>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SecondGuard<'_> {
    pub(super) fn get(&self) -> Option<&Live> {
        self.live.as_deref()
    }

    /// Maps a new buffer of `first` in the second space, too.
    ///
    /// # Errors
    /// The errno of the call; the buffer is mapped in neither.
    pub(super) fn share_buffer(&self, first: &Live, buffer: Piece<'_>) -> Result<(), MapError> {
        let Some(second) = self.get() else { return Ok(()) };
        let span = buffer.span;
        first.copy_and_enter(second, span).map_err(|source| {
            if let Err(error) = first.remove_mapping(buffer, || first.mapped.remove(first, buffer)) {
                log::error!("{error}");
            }
            MapError::Kernel { step: COPY, span, source }
        })
    }

    /// Unmaps a buffer that is about to be dropped.
    pub(super) fn forget_buffer(&self, span: Span<Iova>) {
        let Some(second) = self.get() else { return };
        for piece in span.chunks(CHUNK) {
            if second.mapped.ledger().remove(piece)
                && let Err(error) = second.iommufd.unmap(&second.ioas(Space::Live), piece)
            {
                log::error!("unmap {piece} in the second address space: {error}; it stays mapped there");
            }
        }
    }
}

/// The step that fails if a mapping cannot be copied.
pub(super) const COPY: &str = "map in the second address space (IOMMU_IOAS_COPY)";

/// Why there is no second space, or none any more.
pub(super) fn none(why: impl Into<String>) -> MapError {
    MapError::NoSecondSpace { why: why.into() }
}

impl Live {
    /// Maps in `second` what is mapped here at `span`. Both share the pin.
    pub(super) fn copy_to(&self, second: &Self, span: Span<Iova>, writable: bool) -> io::Result<()> {
        let (from, to) = (self.ioas(Space::Live), second.ioas(Space::Live));
        for piece in span.chunks(CHUNK) {
            if let Err(error) = self.iommufd.copy(&from, &to, piece, writable) {
                let mut copied = span.chunks(CHUNK).take_while(|copied| *copied != piece);
                copied.try_for_each(|copied| self.iommufd.unmap(&to, copied))?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Maps a buffer of this space in `second`, too.
    fn copy_and_enter(&self, second: &Self, buffer: Span<Iova>) -> io::Result<()> {
        self.copy_to(second, buffer, true)?;
        buffer.chunks(CHUNK).for_each(|piece| second.mapped.inherit(piece));
        Ok(())
    }

    /// The device is released: nothing may stay pinned.
    pub(super) fn release_second(&self) {
        let second = self.twin.second();
        if let Some(second) = second.get() {
            second.staging.iter().for_each(Staging::release);
            *second.twin.table() = None;
        }
    }

    /// The device is back: what is mapped in the second space is pinned again.
    pub(super) fn rejoin_second(&self, device: DeviceId) {
        let guard = self.twin.second();
        let Some(second) = guard.get() else { return };
        let pinned = || {
            let table = PageTable::new(Arc::clone(&second.iommufd), second.ioas(Space::Live), device)?;
            second.staging.as_ref().map_or(Ok(()), |staging| staging.rejoin(&table))?;
            Ok::<_, io::Error>(table)
        };
        match pinned() {
            Ok(table) => *second.twin.table() = Some(Arc::new(table)),
            Err(error) => log::error!("pin the memory of the next front-end again: {error}"),
        }
    }

    /// Exchanges all that is mapped with `other`.
    fn exchange_mappings(&self, other: &Self) {
        let (mine, others) = (self.ioas(Space::Live), other.ioas(Space::Live));
        *self.ioas.lock().unwrap_or_else(PoisonError::into_inner) = others;
        *other.ioas.lock().unwrap_or_else(PoisonError::into_inner) = mine;
        self.mapped.exchange(&other.mapped);
        self.exchange_regions(other);
    }
}

impl LiveSpace {
    pub(super) fn allocate_second(&self) -> Result<Arc<dyn SecondSpace>, MapError> {
        let first = &self.0;
        let mut slot = first.twin.second.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.strong_count() != 0 || first.twin.first.is_some() {
            return Err(none("there is one already"));
        }
        let table = first.attachment().table.upgrade().ok_or_else(|| none("the host has the device"))?;
        let buffers = {
            let state = first.hand_over.state();
            if state.window.is_some() || first.iommufd.ownership().owner() != Owner::ThisProcess {
                return Err(none("the first one is being handed over to another process"));
            }
            first.buffers(&state).map_err(|error| none(error.to_string()))?
        };
        let second = Live::second_of(first, &table).map_err(|error| none(error.to_string()))?;
        for span in buffers {
            let copied = first.copy_and_enter(&second, span);
            copied.map_err(|source| MapError::Kernel { step: COPY, span, source })?;
        }
        *slot = Arc::downgrade(&second);
        Ok(Arc::new(Second { live: second, first: self.clone() }))
    }
}

impl Live {
    /// An empty space for the device of `first`, which is attached to `attached`.
    fn second_of(first: &Arc<Self>, attached: &PageTable) -> io::Result<Arc<Self>> {
        let ioas = first.iommufd.alloc_ioas()?;
        let table = PageTable::new(Arc::clone(&first.iommufd), ioas, attached.device())?;
        if table.snoop().enforced != attached.snoop().enforced {
            let (before, now) = (attached.snoop(), table.snoop());
            return Err(io::Error::other(format!("its page table would differ: {before}, now {now}")));
        }
        let staging = first.staging.as_ref().map(|staging| Staging::for_device_of(&table, staging.lines));
        let staging = staging.transpose()?;
        let mapped = MappedMemory::new(staging.is_some(), CHUNK);
        let table = Arc::new(table);
        let twin =
            Twin { first: Some(Arc::clone(first)), table: Mutex::new(Some(Arc::clone(&table))), ..Twin::default() };
        Ok(Arc::new(Self::new(&table, Attachment::default(), (staging, mapped), HandOver::default(), twin)))
    }
}

/// See the top of this file.
struct Second {
    live: Arc<Live>,
    first: LiveSpace,
}

impl SecondSpace for Second {
    fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(LiveSpace(Arc::clone(&self.live)))
    }

    fn exchange(&self) -> Result<(), MapError> {
        let (first, second) = (&*self.first.0, &*self.live);
        // No buffer comes or goes.
        let _guard = first.twin.second();
        if second.borrows_all(first) {
            first.exchange_regions(second);
            log::debug!("the device keeps its page table: the next front-end has the same memory");
            return Ok(());
        }
        second.copy_all_borrowed(first)?;
        let Attachment { file, table } = first.attachment().clone();
        // Without a device the mappings alone change places: its next page table is one of the IOAS that is here then.
        if let Some((file, table)) = file.upgrade().zip(table.upgrade()) {
            let next = second.twin.table().clone().ok_or_else(|| none("its memory could not be pinned again"))?;
            file.attach(next.id()).map_err(MapError::Exchange)?;
            table.exchange(&next);
            first.hand_over.attached_to(Some((table.device(), table.id())));
        }
        first.exchange_mappings(second);
        Ok(())
    }
}

impl Drop for Second {
    /// The buffers are unmapped with the IOAS. The page table must go before it, and what the session has not unmapped was logged.
    fn drop(&mut self) {
        let _guard = self.first.0.twin.second();
        *self.live.twin.table() = None;
    }
}
