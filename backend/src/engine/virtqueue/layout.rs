//! The memory layout of a virtqueue, split (virtio 1.2 §2.7) or packed (§2.8): its areas and sizes, and the faults of a ring.

use std::fmt;

/// Largest supported ring, and longest supported indirect table, in descriptors.
pub const MAX_SIZE: u16 = 1024;

/// The memory layout of a virtqueue, as negotiated with `VIRTIO_F_RING_PACKED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Three areas, each written by one side (virtio 1.2 §2.7).
    Split,
    /// One ring that both sides write, and an event suppression structure for each side (virtio 1.2 §2.8).
    Packed,
}

/// One of a ring's three areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its name in the specification.
    pub name: &'static str,
    /// Its size, bytes.
    pub bytes: u64,
    /// Its alignment, bytes.
    pub alignment: u64,
}

impl Layout {
    /// True if a ring can have this many descriptors.
    #[must_use]
    pub fn allows(self, size: u16) -> bool {
        (1..=MAX_SIZE).contains(&size) && (self == Self::Packed || size.is_power_of_two())
    }

    /// The allowed sizes, for error messages.
    #[must_use]
    pub fn sizes(self) -> &'static str {
        match self {
            Self::Split => "a power of two from 1 to 1024",
            Self::Packed => "a number from 1 to 1024",
        }
    }

    /// The base (SET_VRING_BASE) of a ring that has never run: index 0, and for a packed ring both wrap counters 1
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

/// The driver has made the ring itself invalid. The ring fails; it cannot be read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// More chains are available than the ring has entries.
    #[error("avail.idx jumped from {taken} to {offered} in a ring of {size}")]
    AvailIndex {
        /// The next index to take.
        taken: u16,
        /// The value of avail.idx.
        offered: u16,
        /// Ring size.
        size: u16,
    },
    /// A chain starts outside the descriptor table.
    #[error("the avail ring has head {head} in a ring of {size}")]
    Head {
        /// The head.
        head: u16,
        /// Ring size.
        size: u16,
    },
    /// A chain of a packed ring extends into descriptors that the device has not returned. So its last descriptor, which has the
    /// buffer ID (virtio 1.2 §2.8.6), does not exist.
    #[error("the chain at descriptor {slot} does not end within the {room} descriptors that the driver owns")]
    Endless {
        /// The first descriptor.
        slot: u16,
        /// Number of descriptors that the driver owns.
        room: u16,
    },
}
