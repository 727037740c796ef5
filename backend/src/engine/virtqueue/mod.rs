//! A virtqueue, device side, in either of its layouts: split (virtio 1.2 §2.7) or packed (§2.8). What the rest of the
//! engine sees is the same for both, and stands here; what is peculiar to one stands in [`split`] or
//! [`packed`].
//!
//! A ring knows nothing of requests: it hands out [`Chain`]s of *claimed* buffers, takes back their heads with lengths, and
//! says when the driver wants to be told.

mod areas;
pub mod chain;
mod descriptor;
mod fast_path;
pub(super) mod layout;
pub mod packed;
pub mod split;

pub use fast_path::{FastDescriptor, FastRequest};
pub use layout::{Area, Broken, Layout, MAX_SIZE};

use super::error::EngineError;
use super::guest_memory::GuestMemoryView;
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

/// One line for both layouts.
macro_rules! either {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            Self::Split($ring) => $call,
            Self::Packed($ring) => $call,
        }
    };
}

impl Virtqueue {
    /// Finds the three areas in `table`, and goes on where `setup` says.
    ///
    /// # Errors
    /// [`EngineError::RingSize`], [`EngineError::RingArea`] or [`EngineError::RingBase`] if the ring could not be served
    /// without touching memory it does not own.
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

    /// Number of descriptors.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Where to go on, as GET_VRING_BASE has it.
    #[must_use]
    pub fn base(&self) -> u32 {
        either!(self, ring => ring.base())
    }

    /// How many chains may be taken now, at most: 0 if there is none. What the driver wrote before it offered them is
    /// visible afterwards.
    ///
    /// # Errors
    /// [`Broken`]
    #[inline]
    pub fn available(&self) -> Result<u16, Broken> {
        match self {
            Self::Split(ring) => ring.available(),
            Self::Packed(ring) => Ok(ring.available()),
        }
    }

    /// Takes the next chain; false if there is none after all. No more may be taken than [`Self::available`] said.
    ///
    /// # Errors
    /// [`Broken`]; nothing has been taken.
    #[inline]
    pub fn take(&mut self, guest: &mut GuestMemoryView, chain: &mut Chain) -> Result<bool, Broken> {
        match self {
            Self::Split(ring) => ring.take(guest, chain).map(|()| true),
            Self::Packed(ring) => ring.take(guest, chain),
        }
    }

    /// The next chain, not yet taken, if it is the fast request. [`Self::available`] has said that there is one.
    #[inline]
    pub fn fast(&self, guest: &mut GuestMemoryView) -> Option<FastRequest> {
        either!(self, ring => ring.fast(guest))
    }

    /// Takes the chain that [`Self::fast`] has shown last.
    #[inline]
    pub fn take_fast(&mut self, fast: &FastRequest) {
        match self {
            Self::Split(ring) => ring.take_fast(),
            Self::Packed(ring) => ring.take_fast(fast.head().entries()),
        }
    }

    /// Gives a chain back with `len` bytes written to it. The driver sees it after [`Self::publish`].
    #[inline]
    pub fn push_used(&mut self, head: Head, len: u32) {
        either!(self, ring => ring.push_used(head, len));
    }

    /// True if there is something to publish.
    #[inline]
    #[must_use]
    pub fn has_unpublished(&self) -> bool {
        either!(self, ring => ring.has_unpublished())
    }

    /// Shows the driver every chain given back so far; true if it wants to be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Asks the driver for a kick at the next chain. One that came in meanwhile gets none, so the caller must look once
    /// more before it sleeps.
    pub fn arm(&self) {
        either!(self, ring => ring.arm());
    }

    /// Tells the driver that kicks are not needed while we look by ourselves.
    pub fn disarm(&self) {
        either!(self, ring => ring.disarm());
    }
}
