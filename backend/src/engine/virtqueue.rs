//! A virtqueue, device side, in either of its layouts: split (virtio 1.2 §2.7) or packed (§2.8). What the rest of the
//! engine sees is the same for both, and stands here; what is peculiar to one stands in [`super::split`] or
//! [`super::packed`].
//!
//! A ring knows nothing of requests: it hands out [`Chain`]s of *claimed* buffers, takes back their heads with lengths, and
//! says when the driver wants to be told.

use std::fmt;

use super::chain::{Chain, Head};
use super::guest::Guest;
use super::packed::PackedRing;
use super::split::SplitRing;
use super::usual::Usual;
use super::{EngineError, RingSetup};
use crate::addr::{Address, Gpa, Span};
use crate::memory::MemTable;
use crate::sys::Window;

/// Largest ring this device offers; also the longest indirect table it takes.
pub const MAX_SIZE: u16 = 1024;

/// How a virtqueue lies in memory: `VIRTIO_F_RING_PACKED` decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Three areas, each written by one side (virtio 1.2 §2.7).
    Split,
    /// One ring that both sides write, and a structure each for notifications (virtio 1.2 §2.8).
    Packed,
}

/// One of a ring's three areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// What the specification calls it.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// What its address must be a multiple of.
    pub alignment: u64,
}

impl Layout {
    /// True if a ring can have this many descriptors.
    #[must_use]
    pub fn allows(self, size: u16) -> bool {
        (1..=MAX_SIZE).contains(&size) && (self == Self::Packed || size.is_power_of_two())
    }

    /// Which sizes are allowed, in words.
    #[must_use]
    pub fn sizes(self) -> &'static str {
        match self {
            Self::Split => "a power of two from 1 to 1024",
            Self::Packed => "a number from 1 to 1024",
        }
    }

    /// What SET_VRING_BASE says of a ring that has never run: index 0, and for a packed ring both wrap counters 1
    /// (virtio 1.2 §2.8.1).
    #[must_use]
    pub fn first_base(self) -> u32 {
        match self {
            Self::Split => 0,
            Self::Packed => 0x8000_8000,
        }
    }

    /// The areas in the order descriptors, driver, device.
    #[must_use]
    pub fn areas(self, size: u16, event_idx: bool) -> [Area; 3] {
        let entries = u64::from(size);
        let event = if event_idx { 2 } else { 0 };
        let area = |name, bytes, alignment| Area { name, bytes, alignment };
        match self {
            // virtio 1.2 §2.7
            Self::Split => [
                area("descriptor table", 16 * entries, 16),
                area("avail ring", 4 + 2 * entries + event, 2),
                area("used ring", 4 + 8 * entries + event, 4),
            ],
            // virtio 1.2 §2.8.10.1
            Self::Packed => [
                area("descriptor ring", 16 * entries, 16),
                area("driver event suppression structure", 4, 4),
                area("device event suppression structure", 4, 4),
            ],
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Split => "split",
            Self::Packed => "packed",
        })
    }
}

/// The driver has broken the ring's own rules; nothing in the ring can be believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// More entries are offered than the ring has.
    #[error("avail.idx jumped from {taken} to {offered} in a ring of {size}")]
    AvailIndex {
        /// Next index to take.
        taken: u16,
        /// What avail.idx says.
        offered: u16,
        /// Ring size.
        size: u16,
    },
    /// A chain starts outside the descriptor table.
    #[error("avail ring names descriptor {head} in a ring of {size}")]
    Head {
        /// The index offered.
        head: u16,
        /// Ring size.
        size: u16,
    },
    /// A chain of a packed ring runs into descriptors that the device has not given back. Its last descriptor, which
    /// carries its name (virtio 1.2 §2.8.6), does not exist.
    #[error("the chain at descriptor {slot} does not end within the {room} descriptors that the driver owns")]
    Endless {
        /// Where it starts.
        slot: u16,
        /// Descriptors that the driver could have used.
        room: u16,
    },
}

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
    pub fn new(setup: &RingSetup, table: &MemTable) -> Result<Self, EngineError> {
        let RingSetup { index, size, layout, .. } = *setup;
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
    pub fn take(&mut self, guest: &mut Guest, chain: &mut Chain) -> Result<bool, Broken> {
        match self {
            Self::Split(ring) => ring.take(guest, chain).map(|()| true),
            Self::Packed(ring) => ring.take(guest, chain),
        }
    }

    /// The next chain, not yet taken, if it is the usual request. [`Self::available`] has said that there is one.
    #[inline]
    pub fn usual(&self, guest: &mut Guest) -> Option<Usual> {
        either!(self, ring => ring.usual(guest))
    }

    /// Takes the chain that [`Self::usual`] has shown last.
    #[inline]
    pub fn take_usual(&mut self, usual: &Usual) {
        match self {
            Self::Split(ring) => ring.take_usual(),
            Self::Packed(ring) => ring.take_usual(usual.head().entries()),
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

/// Finds the areas of a ring in guest memory.
pub(super) fn windows(setup: &RingSetup, table: &MemTable) -> Result<[Window; 3], EngineError> {
    let [desc, driver, device] = setup.layout.areas(setup.size, setup.event_idx);
    let find = |area, span| window(setup.index, area, span, table);
    Ok([find(desc, setup.desc)?, find(driver, setup.avail)?, find(device, setup.used)?])
}

fn window(index: usize, area: Area, span: Span<Gpa>, table: &MemTable) -> Result<Window, EngineError> {
    let Area { name, bytes, alignment } = area;
    let refused = || EngineError::RingArea { index, name, span, bytes, alignment };
    let exact = span.slice(0, bytes).filter(|span| span.start().is_aligned(alignment)).ok_or_else(refused)?;
    let (window, offset) = table.window(exact, &mut 0).ok_or_else(refused)?;
    let len = usize::try_from(bytes).map_err(|_| refused())?;
    window.slice(offset, len).ok_or_else(refused)
}
