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

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use super::page_table::PageTable;
use super::{CHUNK, Device, LAST_BUFFER_IOVA, Live, LiveSpace, MappedMemory, Staging, flush, list};
use crate::addr::{Address, Bytes, Iova, Span};
use crate::hardware::MapError;
use crate::memory::{FileId, Region};
use crate::sys::{CacheLines, Cdev, DeviceId, HwptId, Iommufd, Owner};

/// The largest and the smallest window for the successor's buffers, bytes. A queue pair needs about 2 MiB.
const WINDOW: (u64, u64) = (1 << 30, 16 << 20);
/// Smallest page of every IOMMU, bytes.
const PAGE: u64 = 4096;
/// More ranges than any front-end has. Fewer than a hostile description could hold.
const MAX_RANGES: usize = 65536;

/// An address space as its successor must know it. All addresses and sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceDescription {
    /// Object number of the device.
    pub device: u32,
    /// Object number of the IOAS.
    pub ioas: u32,
    /// Object number of the page table that the device is attached to.
    pub page_table: u32,
    /// The staging space, if DMA is not coherent.
    pub staging: Option<StagingDescription>,
    /// Mapped guest memory.
    pub regions: Vec<MappedRegion>,
    /// Mappings of the predecessor's own memory.
    pub buffers: Vec<MappedRange>,
    /// Where the successor may map its own memory before it has taken over. Nothing is mapped there.
    pub window: MappedRange,
    /// True if the pinned memory counts against the limit of the user, and so the account can be moved.
    pub accounted: bool,
}

/// The space in which memory is pinned while it is flushed. Nothing is mapped there between two calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingDescription {
    /// Object number of the IOAS.
    pub ioas: u32,
    /// Object number of its page table.
    pub page_table: u32,
    /// True if the caches hold nothing of guest memory that the device has written. Else the successor flushes it all.
    pub flushed: bool,
}

/// A range of IOVAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRange {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// A mapped region of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedRegion {
    /// Where it is mapped.
    pub range: MappedRange,
    /// The file behind it.
    pub file: FileId,
    /// Its offset in the file.
    pub offset: u64,
    /// The device may write it.
    pub writable: bool,
}

/// Why an address space cannot be handed over, or not be accepted.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// There is nothing to hand over.
    #[error("the host has the device: nothing is pinned that a hand-over could keep; restart the program instead")]
    Released,
    /// Part of a region could not be unmapped before.
    #[error("{0} is only partly mapped, because unmapping it failed")]
    PartlyMapped(Span<Iova>),
    /// There is no room.
    #[error("no free IOVA range for the successor's own memory in {allowed}; {} are needed", Bytes(WINDOW.1))]
    NoWindow {
        /// The ranges that the IOMMU allows.
        allowed: String,
    },
    /// The description names something that does not exist, or contradicts itself.
    #[error("the description of the address space is wrong: {0}")]
    Description(String),
    /// The kernel does not confirm the description.
    #[error("{what}: {source}")]
    Kernel {
        /// What has been checked, or done.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// Guest memory that the session does not know.
    #[error("{0} is mapped, but the session has no such memory")]
    NotAdopted(Span<Iova>),
}

impl From<Span<Iova>> for MappedRange {
    fn from(span: Span<Iova>) -> Self {
        Self { start: span.start().raw(), len: span.len() }
    }
}

impl MappedRange {
    fn span(self) -> Result<Span<Iova>, HandOverError> {
        let span = Span::new(Iova(self.start), self.len).filter(|span| span.start().is_aligned(PAGE));
        let wrong = || HandOverError::Description(format!("{:#x} bytes at {:#x} are no pages", self.len, self.start));
        span.filter(|span| span.len().is_multiple_of(PAGE)).ok_or_else(wrong)
    }
}

impl MappedRegion {
    fn of(region: &Region) -> Self {
        let range = region.gpa().identity_iova().into();
        Self { range, file: region.id(), offset: region.offset(), writable: region.writable() }
    }
}

/// What is known of the mappings for a hand-over.
#[derive(Default)]
pub(super) struct HandOver(Mutex<State>);

#[derive(Default)]
struct State {
    /// The attached device and its page table; `None` while the device is released.
    attachment: Option<(DeviceId, HwptId)>,
    /// Guest memory that the session knows.
    regions: BTreeMap<Iova, MappedRegion>,
    /// In the successor: guest memory that the session has not adopted yet.
    inherited: BTreeMap<Iova, MappedRegion>,
    /// In the successor: the predecessor's buffers.
    foreign: Vec<Span<Iova>>,
    /// Where buffers may be mapped, if not anywhere; in the predecessor the window of its successor.
    window: Option<Span<Iova>>,
    /// The inherited memory need not be flushed when it is adopted.
    flushed: bool,
    accounted: bool,
}

impl HandOver {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device is attached to this page table now, or released.
    pub(super) fn attached_to(&self, attachment: Option<(DeviceId, HwptId)>) {
        self.state().attachment = attachment;
    }

    /// `region` has been mapped.
    pub(super) fn mapped(&self, region: &Region) {
        self.state().regions.insert(region.gpa().identity_iova().start(), MappedRegion::of(region));
    }

    /// The region at `span` has been unmapped.
    pub(super) fn unmapped(&self, span: Span<Iova>) {
        self.state().regions.remove(&span.start());
    }
}

impl Live {
    fn owner(&self) -> Owner {
        self.iommufd.ownership().owner()
    }

    /// True if another process keeps what is mapped here: then nothing is unmapped, and the session just forgets `region`.
    pub(super) fn keeps_mapped(&self, region: &Region) -> bool {
        let span = region.gpa().identity_iova();
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
        let (span, wanted) = (region.gpa().identity_iova(), MappedRegion::of(region));
        let mut state = self.hand_over.state();
        if state.inherited.get(&span.start()) != Some(&wanted) {
            let free = self.owner() == Owner::ThisProcess && state.window.is_none();
            return if free { Ok(false) } else { Err(MapError::HandOver { span }) };
        }
        if let Some(staging) = &self.staging {
            let mut flushable = staging.flushable();
            if !state.flushed {
                flush(&staging.lines, region.memory(), 0, region.memory().len());
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
    pub(super) fn room_for_buffers(&self, allowed: &[Span<Iova>], about: Span<Iova>) -> Result<Vec<Span<Iova>>, MapError> {
        let below = |range: &Span<Iova>| Span::inclusive(range.start(), range.last().min(LAST_BUFFER_IOVA));
        let allowed: Vec<_> = allowed.iter().filter_map(below).collect();
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
                let table = staging.device().staging_table.as_ref().map(PageTable::id).ok_or(HandOverError::Released)?;
                Some(StagingDescription { ioas: staging.ioas.number(), page_table: table.number(), flushed })
            }
        };
        let buffers = live.buffers(&state)?;
        let window = live.window()?;
        state.window = Some(window);
        Ok(SpaceDescription {
            device: device.number(),
            ioas: live.ioas.number(),
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
        let unmapped = live.iommufd.unmap_window(&live.ioas, window).map_err(error("unmap the successor's memory"))?;
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
            match live.iommufd.unmap(&live.ioas, span) {
                Ok(()) => live.mapped.forget(span),
                Err(error) => log::error!("unmap {span} of the predecessor: {error}; it stays mapped"),
            }
        }
        if accounted {
            match live.iommufd.change_process() {
                Ok(()) => log::info!("the account of pinned memory is this process's now"),
                // It stays with the user, and is reduced when the memory is unmapped.
                Err(error) => log::warn!("IOMMU_IOAS_CHANGE_PROCESS: {error}; VmPin does not show the memory taken over"),
            }
        }
        Ok(())
    }

    /// The space that `description` describes, in an iommufd that was received with it. `table` is its page table, `device` is
    /// attached to that, and `lines` is what a flushing regime flushes with.
    ///
    /// # Errors
    /// See [`HandOverError`]; nothing has changed.
    pub(crate) fn handed_over(
        description: &SpaceDescription,
        table: &PageTable,
        device: Weak<Cdev>,
        lines: Option<CacheLines>,
    ) -> Result<Self, HandOverError> {
        let iommufd = table.iommufd();
        let staging = match (&description.staging, lines) {
            (None, _) => None,
            (Some(_), None) => return Err(wrong("this processor cannot flush its caches")),
            (Some(staging), Some(lines)) => Some(Staging::handed_over(staging, table, device, lines)?),
        };
        let flushing = description.staging.as_ref();
        let state = State {
            attachment: Some((table.device(), table.id())),
            flushed: flushing.is_none_or(|staging| staging.flushed),
            accounted: description.accounted,
            window: Some(description.window.span()?),
            ..State::default()
        };
        let mapped = MappedMemory::new(staging.is_some(), CHUNK);
        let state = inherit(description, table, &mapped, state)?;
        Ok(Self(Arc::new(Live {
            iommufd: Arc::clone(iommufd),
            ioas: table.ioas.clone(),
            staging,
            mapped,
            released_ranges: Mutex::default(),
            hand_over: HandOver(Mutex::new(state)),
        })))
    }
}

impl Live {
    /// The mapped ranges that are no guest memory.
    fn buffers(&self, state: &State) -> Result<Vec<Span<Iova>>, HandOverError> {
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
        let allowed = self.iommufd.iova_ranges(&self.ioas).map_err(|source| HandOverError::Kernel { what, source })?;
        let below = |range: &Span<Iova>| Span::inclusive(range.start(), range.last().min(LAST_BUFFER_IOVA));
        let allowed: Vec<_> = allowed.iter().filter_map(below).collect();
        let ledger = self.mapped.ledger();
        let sizes = std::iter::successors(Some(WINDOW.0), |size| Some(size / 2)).take_while(|size| *size >= WINDOW.1);
        let found = sizes.into_iter().find_map(|size| ledger.highest_gap(&allowed, size, PAGE));
        found.ok_or_else(|| HandOverError::NoWindow { allowed: list(&allowed) })
    }
}

impl Staging {
    fn handed_over(
        description: &StagingDescription,
        table: &PageTable,
        device: Weak<Cdev>,
        lines: CacheLines,
    ) -> Result<Self, HandOverError> {
        let error = |what| move |source| HandOverError::Kernel { what, source };
        let ioas = table.iommufd().existing_ioas(description.ioas).map_err(error("look up the staging space"))?;
        let staged = PageTable::existing(table.iommufd(), &ioas, table.device(), description.page_table);
        let staging_table = Some(staged.map_err(error("look up the staging page table"))?);
        let device = Device { file: device, hwpt: table.id(), staging_table };
        Ok(Self { lines, ioas, device: Mutex::new(device), flushable: Mutex::default() })
    }
}

/// Enters what `description` says is mapped into `mapped`, and checks it: the ranges are allowed, do not overlap, and the kernel
/// has mapped them.
fn inherit(
    description: &SpaceDescription,
    table: &PageTable,
    mapped: &MappedMemory,
    mut state: State,
) -> Result<State, HandOverError> {
    let error = |what| move |source| HandOverError::Kernel { what, source };
    let SpaceDescription { regions, buffers, window, .. } = description;
    if regions.len().max(buffers.len()) > MAX_RANGES {
        return Err(wrong("it has more ranges than any front-end"));
    }
    let mut ranges = Vec::new();
    for region in regions {
        let span = region.range.span()?;
        state.inherited.insert(span.start(), region.clone());
        ranges.extend(span.chunks(CHUNK).map(|piece| (piece, region.writable)));
    }
    for buffer in buffers {
        let span = buffer.span()?;
        state.foreign.push(span);
        ranges.push((span, true));
    }
    let allowed = table.iommufd().iova_ranges(&table.ioas).map_err(error("IOMMU_IOAS_IOVA_RANGES"))?;
    let window = window.span()?;
    for (span, _) in ranges.iter().chain([&(window, true)]) {
        if !allowed.iter().any(|range| range.covers(span)) {
            return Err(HandOverError::Description(format!("{span} is not allowed, but only {}", list(&allowed))));
        }
        mapped.inherit(*span).map_err(|taken| HandOverError::Description(format!("{span} overlaps {taken}")))?;
    }
    mapped.forget(window);
    match table.iommufd().not_mapped(&table.ioas, &ranges).map_err(error("check what is mapped"))? {
        None => Ok(state),
        Some(span) => Err(HandOverError::Description(format!("{span} is not mapped as it says"))),
    }
}

fn wrong(what: &str) -> HandOverError {
    HandOverError::Description(what.to_owned())
}

/// True if the kernel lets this process lock any amount of memory. It then keeps no account that could be moved, and
/// IOMMU_IOAS_CHANGE_PROCESS would only falsify `VmPin`.
fn may_lock_any_amount() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::IPC_LOCK))
}

/// A page table of an iommufd that was handed over.
///
/// # Errors
/// The number that names no such object, and its errno.
pub(crate) fn existing_page_table(iommufd: &Arc<Iommufd>, space: &SpaceDescription) -> Result<PageTable, HandOverError> {
    let error = |what| move |source| HandOverError::Kernel { what, source };
    let ioas = iommufd.existing_ioas(space.ioas).map_err(error("look up the address space"))?;
    let device = iommufd.existing_device(space.device).map_err(error("look up the device"))?;
    PageTable::existing(iommufd, &ioas, device, space.page_table).map_err(error("look up the page table"))
}
