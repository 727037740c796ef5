//! Hands an address space over to another process, its successor, without unpinning a page.
//!
//! ```text
//! predecessor                                       successor
//! describe: numbers, mapped ranges, a window  ───►  handed_over: checks each against the kernel
//!                                                   add: adopts a region, with no call to the kernel
//!                                                   buffer: maps, within the window only
//!           ◄─────────── up ───────────────────────
//! left: drops nothing any more                ───►  take_over: unmaps the predecessor's buffers, moves the account
//! or take_back: unmaps the window
//! ```
//!
//! Both processes have the same objects open. [`Owner`] says what each may undo.

use rustix::thread::{CapabilitySet, capabilities};
use std::collections::BTreeMap;

use super::hand_over_state::State;
use super::ledger::list;
use super::mapped_memory::CHUNK;
use super::page_table::PageTable;
use super::sequence::Space;
use super::space_description::{
    HandOverError, MappedRange, MappedRegion, SpaceDescription, StagingDescription, WINDOW, page,
};
use super::{Live, LiveSpace, buffer, whole};
use crate::addr::{Bytes, Iova, Span};
use crate::hardware::MapError;
use crate::memory::Region;
use crate::sys::Owner;

impl Live {
    fn owner(&self) -> Owner {
        self.iommufd.ownership().owner()
    }

    /// True if another process keeps what is mapped here: then nothing is unmapped, and the session just forgets `region`.
    pub(super) fn keeps_mapped(&self, region: &Region) -> bool {
        let span = region.iova();
        let mut state = self.hand_over.state();
        match self.owner() {
            Owner::ThisProcess => return false,
            Owner::Successor => {}
            Owner::Predecessor => {
                let adopted = state.regions.remove(&span.start());
                state.inherited.extend(adopted.map(|region| (span.start(), region)));
            }
        }
        if let Some(staging) = &self.staging {
            staging.flushable().remove(&span.start());
        }
        true
    }

    /// Takes `region` as mapped if the predecessor has mapped the same memory; false if it must be mapped.
    ///
    /// # Errors
    /// [`MapError::HandOver`] if it may not be mapped now; [`MapError::Kernel`] if it cannot be flushed.
    pub(super) fn adopt(&self, region: &Region) -> Result<bool, MapError> {
        let (span, wanted) = (region.iova(), MappedRegion::of(region));
        let mut state = self.hand_over.state();
        if state.inherited.get(&span.start()) != Some(&wanted) {
            let free = self.owner() == Owner::ThisProcess && state.window.is_none();
            return if free { Ok(false) } else { Err(MapError::HandOver { span }) };
        }
        if let Some(staging) = &self.staging {
            let mut flushable = staging.flushable();
            if !state.flushed {
                let flushed = self.mapped.flush_inherited(self, whole(region));
                flushed.map_err(|(step, source)| MapError::Kernel { step, span, source })?;
            }
            flushable.insert(span.start(), (span, region.memory().clone()));
        }
        state.inherited.remove(&span.start());
        state.regions.insert(span.start(), wanted);
        log::info!("region {span} is mapped already");
        Ok(true)
    }

    /// The part of `allowed` in which a buffer may be placed now. `about` is only for the error.
    ///
    /// # Errors
    /// [`MapError::HandOver`] if there is none.
    pub(super) fn room_for_buffers(
        &self,
        allowed: Vec<Span<Iova>>,
        about: Span<Iova>,
    ) -> Result<Vec<Span<Iova>>, MapError> {
        match (self.hand_over.state().window, self.owner()) {
            (None, Owner::ThisProcess) => Ok(allowed),
            (Some(window), Owner::Predecessor) => Ok(vec![window]),
            (window, _) => Err(MapError::HandOver { span: window.unwrap_or(about) }),
        }
    }

    /// True if a buffer is to be unmapped when it is dropped. Those of the predecessor belong to the successor.
    pub(super) fn unmaps_buffers(&self) -> bool {
        self.owner() != Owner::Successor
    }
}

impl LiveSpace {
    /// Describes the space for a successor, and sets a window of addresses aside for it. Until [`Self::take_back`] or until the
    /// iommufd has passed to the successor, nothing else can be mapped. `flushed`: see [`StagingDescription::flushed`].
    ///
    /// # Errors
    /// See [`HandOverError`]; nothing has changed.
    pub(crate) fn describe(&self, flushed: bool) -> Result<SpaceDescription, HandOverError> {
        let live = &*self.0;
        let mut state = live.hand_over.state();
        let (device, page_table) = state.attachment.ok_or(HandOverError::Released)?;
        let staging = match &live.staging {
            None => None,
            Some(staging) => {
                let table = staging.table().as_ref().map(PageTable::id).ok_or(HandOverError::Released)?;
                Some(StagingDescription { ioas: staging.ioas.number(), page_table: table.number(), flushed })
            }
        };
        let buffers = live.buffers(&state)?;
        let window = live.window()?;
        state.window = Some(window);
        Ok(SpaceDescription {
            device: device.number(),
            ioas: live.ioas(Space::Live).number(),
            page_table: page_table.number(),
            staging,
            regions: state.regions.values().cloned().collect(),
            buffers: buffers.into_iter().map(MappedRange::from).collect(),
            window: window.into(),
            accounted: !may_lock_any_amount(),
        })
    }

    /// Undoes [`Self::describe`]: unmaps what the successor has mapped. The successor must have ended, and the device must do no
    /// DMA.
    ///
    /// # Errors
    /// The call that failed. What it should have unmapped stays mapped, and hinders nothing but another hand-over.
    pub(crate) fn take_back(&self) -> Result<(), HandOverError> {
        let live = &*self.0;
        let Some(window) = live.hand_over.state().window.take() else { return Ok(()) };
        let error = |what| move |source| HandOverError::Kernel { what, source };
        let unmapped = live
            .iommufd
            .unmap_window(&live.ioas(Space::Live), window)
            .map_err(error("unmap the successor's memory"))?;
        if let Some(staging) = &live.staging {
            live.iommufd.unmap_all(&staging.ioas).map_err(error("unmap what the successor has staged"))?;
        }
        log::info!("unmapped {} of the successor in {window}", Bytes(unmapped));
        Ok(())
    }

    /// Guest memory that is mapped, and that no session has added yet. Empty unless the space was handed over.
    #[must_use]
    pub(crate) fn not_adopted(&self) -> Vec<Span<Iova>> {
        let state = self.0.hand_over.state();
        state.inherited.values().filter_map(|region| region.range.span().ok()).collect()
    }

    /// Takes over from the predecessor, which has let go: unmaps its buffers, and moves the account of pinned memory here.
    ///
    /// # Errors
    /// [`HandOverError::NotAdopted`]; nothing has changed, and this process still owns nothing. A call that fails is logged.
    pub(crate) fn take_over(&self) -> Result<(), HandOverError> {
        let live = &*self.0;
        if let Some(span) = self.not_adopted().first() {
            return Err(HandOverError::NotAdopted(*span));
        }
        live.iommufd.ownership().pass_to(Owner::ThisProcess);
        let (foreign, accounted) = {
            let mut state = live.hand_over.state();
            state.window = None;
            (std::mem::take(&mut state.foreign), state.accounted)
        };
        for span in foreign {
            match live.iommufd.unmap(&live.ioas(Space::Live), span) {
                Ok(()) => live.mapped.forget(span),
                Err(error) => log::error!("unmap {span} of the predecessor: {error}; it stays mapped"),
            }
        }
        if accounted {
            match live.iommufd.change_process() {
                Ok(()) => log::info!("the account of pinned memory is this process's now"),
                // It stays with the user, and is reduced when the memory is unmapped.
                Err(error) => {
                    log::warn!("IOMMU_IOAS_CHANGE_PROCESS: {error}; VmPin does not show the memory taken over")
                }
            }
        }
        Ok(())
    }
}

impl Live {
    /// The mapped ranges that are no guest memory.
    pub(super) fn buffers(&self, state: &State) -> Result<Vec<Span<Iova>>, HandOverError> {
        let mut spans: BTreeMap<_, _> = self.mapped.ledger().spans().map(|span| (span.start(), span)).collect();
        for region in state.regions.values() {
            let whole = region.range.span()?;
            for piece in whole.chunks(CHUNK) {
                spans.remove(&piece.start()).filter(|span| *span == piece).ok_or(HandOverError::PartlyMapped(whole))?;
            }
        }
        Ok(spans.into_values().collect())
    }

    /// A free range for the successor's buffers.
    fn window(&self) -> Result<Span<Iova>, HandOverError> {
        let what = "IOMMU_IOAS_IOVA_RANGES";
        let allowed = self.iommufd.iova_ranges(&self.ioas(Space::Live));
        let allowed = allowed.map_err(|source| HandOverError::Kernel { what, source })?;
        let allowed = buffer::ranges(&allowed);
        let ledger = self.mapped.ledger();
        let sizes = std::iter::successors(Some(WINDOW.0), |size| Some(size / 2)).take_while(|size| *size >= WINDOW.1);
        let found = sizes.into_iter().find_map(|size| ledger.highest_gap(&allowed, size, page()));
        found.ok_or_else(|| HandOverError::NoWindow { allowed: list(&allowed) })
    }
}

/// True if the kernel lets this process lock any amount of memory. It then keeps no account that could be moved, and
/// IOMMU_IOAS_CHANGE_PROCESS would only falsify `VmPin`.
fn may_lock_any_amount() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK))
}
