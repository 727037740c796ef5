//! A virtqueue, device side: the interface common to the two layouts, [`split`] (virtio 1.2 §2.7) and [`packed`] (§2.8).
//!
//! A virtqueue knows nothing of requests. It returns [`Chain`]s of *unchecked* buffers, accepts used entries, and tells when to
//! notify the driver.

mod areas;
pub mod chain;
pub(super) mod descriptor;
mod fast_path;
pub(super) mod layout;
pub mod packed;
pub mod position;
pub mod split;

pub use fast_path::{FastDescriptor, FastRequest, FastRing};
pub use layout::{Area, Layout, MAX_SIZE, RingFault};

use super::dirty_log::RingLog;
use super::error::EngineError;
use super::guest_memory::GuestMemoryView;
use super::inflight_region::{Contradiction, InflightRegion, Tracking};
use super::setup::VringSetup;
use crate::memory::MemTable;
use chain::{Chain, Head};
use packed::PackedRing;
use split::SplitRing;

/// One running virtqueue.
pub enum Virtqueue {
    /// See [`Layout::Split`].
    Split(SplitRing),
    /// See [`Layout::Packed`].
    Packed(PackedRing),
}

/// Where the used entries begin that are not published, and how many ring slots they take: first slot, number.
#[derive(Clone, Copy, Debug)]
pub struct Unpublished((usize, usize));

/// Evaluates one expression for either layout.
macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Self::Split($ring) => $call,
            Self::Packed($ring) => $call,
        }
    };
}

impl Virtqueue {
    /// Finds the three areas in `table`. The ring starts at `setup.base`.
    ///
    /// # Errors
    /// [`EngineError::RingSize`], [`EngineError::RingArea`] or [`EngineError::RingBase`].
    pub fn new(setup: &VringSetup, table: &MemTable) -> Result<Self, EngineError> {
        let VringSetup { index, size, layout, .. } = *setup;
        if !layout.allows(size) {
            return Err(EngineError::RingSize { index, size, layout });
        }
        match layout {
            Layout::Split => SplitRing::new(setup, table).map(Self::Split),
            Layout::Packed => PackedRing::new(setup, table).map(Self::Packed),
        }
    }

    /// Records the requests in flight in `region` from now on, and finds those of the process before. The queue has just been
    /// created.
    ///
    /// # Errors
    /// The record is not believed. Nothing has changed.
    pub fn track(&mut self, region: &InflightRegion) -> Result<Tracking, Contradiction> {
        either!(self, ring => ring.track(region))
    }

    /// True if requests that [`Self::track`] has found remain to be submitted again. They come before all others.
    #[inline]
    #[must_use]
    pub fn has_recovered(&self) -> bool {
        either!(self, ring => ring.has_recovered())
    }

    /// Reads the next of them, as [`Self::take`] does. Returns false if there is none.
    pub fn take_recovered(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> bool {
        either!(self, ring => ring.take_recovered(guest, chain))
    }

    /// Leaves them to the process that serves the ring next. Returns how many there are.
    pub fn forget_recovered(&mut self) -> u16 {
        either!(self, ring => ring.forget_recovered())
    }

    /// True if the requests in flight are recorded, see [`Self::track`].
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        either!(self, ring => ring.is_recorded())
    }

    /// Marks what is written to the ring in `log` from now on, and at once all that may have been written before.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        either!(self, ring => ring.set_log(log));
    }

    /// Marks these used entries: before [`Self::publish`], so that they are marked when the driver sees them, and after it, because
    /// it writes once more.
    pub fn mark_used(&self, entries: Unpublished) {
        either!(self, ring => ring.mark_used(entries.0));
    }

    /// The used entries that are not published yet.
    #[must_use]
    pub fn unpublished(&self) -> Unpublished {
        Unpublished(either!(self, ring => ring.unpublished()))
    }

    /// Number of descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// The current position, as GET_VRING_BASE returns it.
    #[must_use]
    pub fn base(&self) -> u32 {
        either!(self, ring => ring.base())
    }

    /// False if it is where a ring starts that has never run.
    #[must_use]
    pub fn has_run(&self) -> bool {
        let layout = if matches!(self, Self::Split(_)) { Layout::Split } else { Layout::Packed };
        self.base() != layout.first_base()
    }

    /// Upper bound of the number of available chains; 0 if there is none. An acquire load: all that the driver wrote before it
    /// made them available is visible afterwards.
    ///
    /// # Errors
    /// [`RingFault`]
    #[inline]
    pub fn available(&self) -> Result<u16, RingFault> {
        match self {
            Self::Split(ring) => ring.available(),
            Self::Packed(ring) => Ok(ring.available()),
        }
    }

    /// Takes the next chain. Returns false if there is none. Callers take at most [`Self::available`] chains.
    ///
    /// # Errors
    /// [`RingFault`]. Nothing has been taken.
    #[inline]
    pub fn take(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> Result<bool, RingFault> {
        match self {
            Self::Split(ring) => ring.take(guest, chain).map(|()| true),
            Self::Packed(ring) => ring.take(guest, chain),
        }
    }

    /// Reads the next chain. `None` if it does not have the fast shape. [`Self::available`] must not be 0. The caller passes it
    /// to [`Self::take_fast`] or to [`Self::leave_fast`] before it calls anything else here: the record may have it as taken.
    #[inline]
    pub fn peek_fast(&mut self, guest: &mut GuestMemoryView) -> Option<FastRequest> {
        let mut guest = guest.batch()?;
        either!(self, ring => ring.peek_fast(&mut guest))
    }

    /// Takes the chain that [`Self::peek_fast`] returned.
    #[inline]
    pub fn take_fast(&mut self, fast: FastRequest) -> Head {
        either!(self, ring => ring.take_fast(fast.head()));
        fast.head()
    }

    /// Leaves the chain that [`Self::peek_fast`] returned in the ring.
    pub fn leave_fast(&mut self, fast: FastRequest) {
        either!(self, ring => ring.leave_fast(fast.head()));
    }

    /// Returns a chain with `len` bytes written to it. The driver sees it after [`Self::publish`].
    #[inline]
    pub fn push_used(&mut self, head: Head, len: u32) {
        either!(self, ring => ring.push_used(head, len));
    }

    /// True if there are unpublished used entries.
    #[inline]
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        either!(self, ring => ring.has_unpublished())
    }

    /// Publishes all used entries. Returns true if the driver must be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Enables the driver's kicks. A chain made available meanwhile brings none, so the caller must poll once more before it
    /// sleeps.
    pub fn arm(&self) {
        either!(self, ring => ring.arm());
    }

    /// Suppresses the driver's kicks while the worker polls.
    pub fn disarm(&self) {
        either!(self, ring => ring.disarm());
    }
}
