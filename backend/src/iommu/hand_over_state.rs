//! What an address space knows of its mappings for a hand-over: which of them are guest memory, and in the successor, which
//! are still the predecessor's.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::space_description::MappedRegion;
use crate::addr::{Iova, Span};
use crate::memory::Region;
use crate::sys::{DeviceId, HwptId};

/// What is known of the mappings for a hand-over.
#[derive(Default)]
pub(super) struct HandOver(Mutex<State>);

/// See the top of this file.
#[derive(Default)]
pub(super) struct State {
    /// The attached device and its page table; `None` while the device is released.
    pub(super) attachment: Option<(DeviceId, HwptId)>,
    /// Guest memory that the session knows.
    pub(super) regions: BTreeMap<Iova, MappedRegion>,
    /// In the successor: guest memory that the session has not adopted yet.
    pub(super) inherited: BTreeMap<Iova, MappedRegion>,
    /// In the successor: the predecessor's buffers.
    pub(super) foreign: Vec<Span<Iova>>,
    /// Where buffers may be mapped, if not anywhere; in the predecessor the window of its successor.
    pub(super) window: Option<Span<Iova>>,
    /// The inherited memory need not be flushed when it is adopted.
    pub(super) flushed: bool,
    pub(super) accounted: bool,
}

impl HandOver {
    pub(super) fn of(state: State) -> Self {
        Self(Mutex::new(state))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device is attached to this page table now, or released.
    pub(super) fn attached_to(&self, attachment: Option<(DeviceId, HwptId)>) {
        self.state().attachment = attachment;
    }

    /// `region` has been mapped.
    pub(super) fn mapped(&self, region: &Region) {
        self.state().regions.insert(region.iova().start(), MappedRegion::of(region));
    }

    /// The region at `span` has been unmapped.
    pub(super) fn unmapped(&self, span: Span<Iova>) {
        self.state().regions.remove(&span.start());
    }
}
