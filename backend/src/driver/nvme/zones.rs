//! The Zoned Namespace command set (ZNS Command Set 1.1): what a zoned namespace reports, and the commands on its zones.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::NvmeErrorKind;
use super::spec::{SubmissionEntry, io_opcode};
use crate::driver::ZoneAction;

/// LBA Format Extension. ZNS Command Set 1.1 §4.1.5.1, figure "LBA Format Extension Data Structure"
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FormatExtension {
    /// ZSZE: size of a zone, logical blocks.
    zone_size: u64,
    /// ZDES: size of the zone descriptor extension.
    descriptor_extension: u8,
    reserved_9: [u8; 7],
}

/// I/O Command Set Specific Identify Namespace for the Zoned Namespace command set, the fields that this driver reads. ZNS
/// Command Set 1.1 §4.1.5.1
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IdentifyZonedNamespace {
    /// Zone Operation Characteristics.
    zoc: u16,
    /// Optional Zoned Command Support.
    ozcs: u16,
    /// Maximum Active Resources, 0's based; FFFFFFFFh: no limit.
    mar: u32,
    /// Maximum Open Resources, 0's based; FFFFFFFFh: no limit.
    mor: u32,
    reserved_12: [u8; 2804],
    formats: [FormatExtension; 64],
    reserved_3840: [u8; 256],
}

const _: () = {
    assert!(size_of::<IdentifyZonedNamespace>() == 4096);
    assert!(std::mem::offset_of!(IdentifyZonedNamespace, formats) == 2816);
};

/// The zones of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zones {
    /// ZSZE, logical blocks.
    pub(super) blocks: u64,
    /// Most open zones; 0: no limit.
    pub(super) max_open: u32,
    /// Most active zones; 0: no limit.
    pub(super) max_active: u32,
}

impl Zones {
    /// Checks the data of a namespace in format `format` with blocks of `block_size` bytes.
    pub(super) fn decode(data: &IdentifyZonedNamespace, format: u8, block_size: u32) -> Result<Self, NvmeErrorKind> {
        let blocks = data.formats[usize::from(format)].zone_size;
        // virtio-blk's zone_sectors has 32 bits (virtio 1.3 §5.2.4).
        let sectors = blocks.checked_mul(u64::from(block_size) / 512).and_then(|sectors| u32::try_from(sectors).ok());
        if sectors.is_none_or(|sectors| sectors == 0) {
            let found = format!("{blocks} blocks of {block_size} bytes");
            return Err(NvmeErrorKind::Unsuitable { property: "zone size", found, wanted: "1 block to 2 TiB" });
        }
        // 0's based, so no limit becomes 0.
        Ok(Self { blocks, max_open: data.mor.wrapping_add(1), max_active: data.mar.wrapping_add(1) })
    }
}

/// The longest append from ZASL, which is byte 0 of the Identify Controller data of this command set: a power of two of the
/// smallest page, which is 4 KiB here; 0: as a transfer. ZNS Command Set 1.1 §4.1.5.4
pub(super) fn longest_append(data: &[u8; 4096], max_transfer: u32) -> u32 {
    match data[0] {
        0 => max_transfer,
        shift @ 1..=16 => max_transfer.min(4096 << shift),
        _ => max_transfer,
    }
}

/// A command on the zone at `block`, with command dword 13.
fn on_zone(opcode: u8, block: u64, cdw13: u32) -> SubmissionEntry {
    SubmissionEntry { cdw12: 0, cdw13, ..SubmissionEntry::on_blocks(opcode, block, 1_u32) }
}

/// Zone Management Send. ZNS Command Set 1.1 §3.4.3
pub(super) fn manage(block: u64, action: ZoneAction) -> SubmissionEntry {
    /// Select All.
    const ALL: u32 = 1 << 8;
    // ZSA, bits 7:0.
    let cdw13 = match action {
        ZoneAction::Close => 0x01,
        ZoneAction::Finish => 0x02,
        ZoneAction::Open => 0x03,
        ZoneAction::Reset => 0x04,
        ZoneAction::ResetAll => 0x04 | ALL,
    };
    on_zone(io_opcode::ZONE_MANAGEMENT_SEND, block, cdw13)
}

/// Zone Management Receive: a report of `bytes` bytes, which counts the zones that it has. ZNS Command Set 1.1 §3.4.2
pub(super) fn report(block: u64, bytes: u32) -> SubmissionEntry {
    /// ZRA 0 (Report Zones), ZRASF 0 (all of them), Partial Report.
    const PARTIAL: u32 = 1 << 16;
    // NUMD, 0's based.
    let cdw12 = bytes / 4 - 1;
    SubmissionEntry { cdw12, ..on_zone(io_opcode::ZONE_MANAGEMENT_RECEIVE, block, PARTIAL) }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    fn data(zone_size: u64) -> IdentifyZonedNamespace {
        let mut data = IdentifyZonedNamespace::new_zeroed();
        data.formats[2].zone_size = zone_size;
        (data.mar, data.mor) = (13, u32::MAX);
        data
    }

    #[test]
    fn limits_of_zones_count_from_zero_and_all_ones_is_none() {
        let zones = Zones::decode(&data(4096), 2, 512).unwrap();
        assert_eq!(zones, Zones { blocks: 4096, max_open: 0, max_active: 14 });
    }

    #[test]
    fn zones_that_virtio_cannot_describe_are_refused() {
        for (blocks, block_size) in [(0, 512), (1 << 32, 512), (1 << 29, 4096), (u64::MAX, 4096)] {
            let error = Zones::decode(&data(blocks), 2, block_size).unwrap_err().to_string();
            assert!(error.contains(&format!("zone size is {blocks} blocks of {block_size}")), "{error}");
        }
        assert!(Zones::decode(&data(u64::from(u32::MAX)), 2, 512).is_ok());
    }

    #[test]
    fn the_longest_append_follows_zasl_up_to_a_transfer() {
        let longest = |zasl: u8| {
            let mut data = [0; 4096];
            data[0] = zasl;
            longest_append(&data, 128 << 10)
        };
        assert_eq!(
            [longest(0), longest(1), longest(4), longest(16), longest(200)],
            [128 << 10, 8192, 64 << 10, 128 << 10, 128 << 10]
        );
    }

    #[test]
    fn commands_on_zones_have_the_numbers_of_the_specification() {
        let entry = report(0x1_0000_0002, 128);
        assert_eq!((entry.opcode, entry.cdw10, entry.cdw11, entry.cdw12, entry.cdw13), (0x7a, 2, 1, 31, 1 << 16));
        use ZoneAction::{Close, Finish, Open, Reset, ResetAll};
        let numbers = [Close, Finish, Open, Reset, ResetAll].map(|action| manage(5, action).cdw13);
        assert_eq!(numbers, [1, 2, 3, 4, 0x104]);
        let entry = manage(5, Open);
        assert_eq!((entry.opcode, entry.cdw10, entry.cdw12), (0x79, 5, 0));
    }
}
