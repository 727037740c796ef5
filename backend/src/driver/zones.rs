//! Zoned namespaces, in the terms of the traits of [`driver`](super).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The zones of a disk. Each must be written from its start to its end, and be reset before it is written again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneGeometry {
    /// Logical blocks from the start of a zone to that of the next.
    pub blocks: u64,
    /// Most zones that can be open; 0 if there is no limit.
    pub max_open: u32,
    /// Most zones that can be open or closed; 0 if there is no limit.
    pub max_active: u32,
    /// Longest append, bytes; whole logical blocks.
    pub max_append: u32,
}

/// What is done to a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneAction {
    /// Reserves the device's resources for writing it.
    Open,
    /// Gives them back, and keeps what is written.
    Close,
    /// Makes it full.
    Finish,
    /// Makes it empty.
    Reset,
    /// Makes every zone empty, whichever is named.
    ResetAll,
}

/// Why the device refuses a command on a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneFault {
    /// The zone is full, read-only or offline, the command ends past its capacity, or the zone cannot change to that state.
    Invalid,
    /// A write does not start at the write pointer.
    WritePointer,
    /// Too many zones are open.
    TooManyOpen,
    /// Too many zones are active.
    TooManyActive,
}

/// The state of a zone. ZNS Command Set 1.1 §2.1.1.2
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ZoneState {
    /// Nothing is written.
    Empty = 1,
    /// Opened by a write.
    ImplicitlyOpen = 2,
    /// Opened by a command.
    ExplicitlyOpen = 3,
    /// Partly written.
    Closed = 4,
    /// Can be read only.
    ReadOnly = 13,
    /// Nothing more can be written.
    Full = 14,
    /// Can be neither read nor written.
    Offline = 15,
}

impl ZoneState {
    fn from_bits(bits: u8) -> Option<Self> {
        let states = [
            Self::Empty,
            Self::ImplicitlyOpen,
            Self::ExplicitlyOpen,
            Self::Closed,
            Self::ReadOnly,
            Self::Full,
            Self::Offline,
        ];
        states.into_iter().find(|state| *state as u8 == bits)
    }

    /// True if the zone has a valid write pointer.
    #[must_use]
    pub fn is_writable(self) -> bool {
        !matches!(self, Self::ReadOnly | Self::Full | Self::Offline)
    }
}

/// A zone in a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Its first logical block.
    pub start: u64,
    /// How many blocks from there on can be written.
    pub capacity: u64,
    /// The block to be written next; without a meaning unless [`ZoneState::is_writable`].
    pub write_pointer: u64,
    /// Its state.
    pub state: ZoneState,
}

/// Bytes of a report's header, and of each of its zones. ZNS Command Set 1.1 §3.4.2.2.1
pub const REPORT_HEADER: u64 = 64;
/// See [`REPORT_HEADER`].
pub const REPORT_ZONE: u64 = 64;

/// Zone Descriptor. ZNS Command Set 1.1 §3.4.2.2.1, figure "Zone Descriptor Data Structure"
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptor {
    /// ZT, bits 3:0.
    kind: u8,
    /// ZS, bits 7:4.
    state: u8,
    attributes: u8,
    attribute_information: u8,
    reserved_4: [u8; 4],
    capacity: u64,
    start: u64,
    write_pointer: u64,
    reserved_32: [u8; 32],
}

const _: () = assert!(size_of::<Descriptor>() as u64 == REPORT_ZONE);

/// ZT of a zone that must be written sequentially; ZNS has no other.
const SEQUENTIAL: u8 = 2;

/// The zones in what [`Command::ZoneReport`](super::Command::ZoneReport) has transferred, up to the first that makes no sense.
pub fn zones(report: &[u8]) -> impl Iterator<Item = Zone> {
    let count = report.first_chunk().map_or(0, |count| u64::from_le_bytes(*count));
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let descriptors = report.chunks_exact(size_of::<Descriptor>()).skip(1).take(count);
    descriptors.map_while(|bytes| {
        let descriptor = Descriptor::read_from_bytes(bytes).expect("cut to its size");
        let state = ZoneState::from_bits(descriptor.state >> 4)?;
        (descriptor.kind & 0xf == SEQUENTIAL).then_some(Zone {
            start: descriptor.start,
            capacity: descriptor.capacity,
            write_pointer: descriptor.write_pointer,
            state,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(count: u64, zones: &[(u8, u8, u64)]) -> Vec<u8> {
        let mut report = vec![0; 64];
        report[..8].copy_from_slice(&count.to_le_bytes());
        for &(kind, state, start) in zones {
            let descriptor = Descriptor {
                kind,
                state,
                attributes: 0xff,
                attribute_information: 0xff,
                reserved_4: [0; 4],
                capacity: 7,
                start,
                write_pointer: start + 3,
                reserved_32: [0; 32],
            };
            report.extend(descriptor.as_bytes());
        }
        report
    }

    #[test]
    fn a_report_has_as_many_zones_as_it_says_and_as_were_transferred() {
        let zones_of = |count| zones(&report(count, &[(0xf2, 0x1f, 0), (2, 0x40, 8), (2, 0xe0, 16)])).count();
        assert_eq!((zones_of(0), zones_of(2), zones_of(3), zones_of(u64::MAX)), (0, 2, 3, 3));
        assert_eq!(zones(&[1; 7]).count(), 0, "shorter than its header");
        let cut = &report(3, &[(2, 0x10, 0), (2, 0x10, 8)])[..64 + 127];
        assert_eq!(zones(cut).count(), 1, "a zone that was cut");
    }

    #[test]
    fn a_zone_has_its_state_and_its_write_pointer() {
        let found: Vec<_> = zones(&report(9, &[(2, 0x20, 8), (2, 0xd0, 16)])).collect();
        let zone = Zone { start: 8, capacity: 7, write_pointer: 11, state: ZoneState::ImplicitlyOpen };
        assert_eq!(found, [zone, Zone { start: 16, write_pointer: 19, state: ZoneState::ReadOnly, ..zone }]);
        assert!(found[0].state.is_writable() && !found[1].state.is_writable());
    }

    #[test]
    fn a_report_ends_at_a_zone_of_an_unknown_kind_or_state() {
        assert_eq!(zones(&report(9, &[(2, 0x10, 0), (1, 0x10, 8), (2, 0x10, 16)])).count(), 1);
        assert_eq!(zones(&report(9, &[(2, 0x50, 0)])).count(), 0);
    }
}
