//! The configuration space of the virtio-blk device (virtio 1.2 §5.2.4). It is built from the drive's geometry each time it
//! is read. `writeback` is the only field that a driver may write.

use std::mem::offset_of;

use zerocopy::{Immutable, IntoBytes};

use super::features::VirtioFeatures;
use super::{Device, Error};
use crate::driver::Geometry;
use crate::engine::Engine;
use crate::engine::request::{BOUNCE_BYTES, RangeLimits, max_append};
use crate::rate_limited_log::SharedLog;

/// Data buffers per request: an indirect table of 128 descriptors, less those of header and status.
pub(super) const SEG_MAX: u32 = 126;

/// Bytes per unit of `capacity` (virtio 1.2 §5.2.4).
const SECTOR: u64 = 512;

/// `struct virtio_blk_config`. Fields of features that are not offered read as zero.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct BlkConfig {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    cylinders: u16,
    heads: u8,
    sectors: u8,
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: u16,
    opt_io_size: u32,
    writeback: u8,
    unused: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    max_secure_erase_sectors: u32,
    max_secure_erase_seg: u32,
    secure_erase_sector_alignment: u32,
    zoned: ZonedCharacteristics,
}

/// `struct virtio_blk_zoned_characteristics` (virtio 1.3 §5.2.4)
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
struct ZonedCharacteristics {
    zone_sectors: u32,
    max_open_zones: u32,
    max_active_zones: u32,
    max_append_sectors: u32,
    write_granularity: u32,
    model: u8,
    unused2: [u8; 3],
}

impl ZonedCharacteristics {
    fn new(geometry: &Geometry) -> Self {
        /// VIRTIO_BLK_Z_HM
        const HOST_MANAGED: u8 = 1;
        let Some(zones) = geometry.zones else { return Self::default() };
        let sectors = zones.blocks * (u64::from(geometry.block_size) / SECTOR);
        Self {
            zone_sectors: u32::try_from(sectors).expect("the driver refuses larger zones"),
            max_open_zones: zones.max_open,
            max_active_zones: zones.max_active,
            max_append_sectors: max_append(geometry, BOUNCE_BYTES) / 512,
            write_granularity: geometry.block_size,
            model: HOST_MANAGED,
            unused2: [0; 3],
        }
    }
}

/// The fields that a front-end must read together with the first, if the disk is zoned.
const ZONES_END: usize = offset_of!(BlkConfig, zoned) + size_of::<ZonedCharacteristics>();

/// Offset of `writeback`.
const WRITEBACK: usize = offset_of!(BlkConfig, writeback);

impl BlkConfig {
    fn new(geometry: &Geometry, queues: u16, writeback: bool) -> Self {
        let ratio = (geometry.physical_block_size / geometry.block_size).max(1);
        let none = RangeLimits { segments: 0, sectors: 0 };
        let discard = RangeLimits::discard(geometry).unwrap_or(none);
        let zeroes = RangeLimits::write_zeroes(geometry).unwrap_or(none);
        Self {
            capacity: geometry.blocks.saturating_mul(u64::from(geometry.block_size) / SECTOR),
            size_max: geometry.max_transfer,
            seg_max: SEG_MAX,
            cylinders: 0,
            heads: 0,
            sectors: 0,
            blk_size: geometry.block_size,
            physical_block_exp: u8::try_from(ratio.ilog2()).expect("a logarithm of 32 bits"),
            alignment_offset: u8::try_from(geometry.alignment_offset / geometry.block_size.max(1)).unwrap_or(0),
            min_io_size: u16::try_from(ratio).unwrap_or(u16::MAX),
            opt_io_size: geometry.optimal_size / geometry.block_size.max(1),
            writeback: u8::from(writeback),
            unused: 0,
            num_queues: queues,
            max_discard_sectors: discard.sectors,
            max_discard_seg: discard.segments,
            discard_sector_alignment: if discard.segments == 0 { 0 } else { geometry.block_size / 512 },
            max_write_zeroes_sectors: zeroes.sectors,
            max_write_zeroes_seg: zeroes.segments,
            write_zeroes_may_unmap: u8::from(geometry.zeroes.is_some_and(|limits| limits.deallocates)),
            unused1: [0; 3],
            max_secure_erase_sectors: 0,
            max_secure_erase_seg: 0,
            secure_erase_sector_alignment: 0,
            zoned: ZonedCharacteristics::new(geometry),
        }
    }
}

/// Features can be acknowledged any number of times.
static LOG: SharedLog = SharedLog::new(module_path!());

/// Reads `size` bytes of configuration space from `offset`; zero past its end.
///
/// # Errors
/// [`Error::ZonesUnread`]: QEMU reads the whole space of its device in one message when it creates the device. If that ends
/// before the zones, the device can be refused there, before a guest waits for it.
pub(super) fn read(device: &Device, offset: usize, size: usize) -> Result<Vec<u8>, Error> {
    let Device { engine, queues, .. } = device;
    let geometry = engine.geometry();
    if geometry.zones.is_some() && offset == 0 && (LONGEST_FIELD + 1..ZONES_END).contains(&size) {
        return Err(Error::ZonesUnread { found: size });
    }
    Ok(slice(&BlkConfig::new(&geometry, *queues, engine.write_cache()), offset, size))
}

/// Bytes of the longest field. A front-end that reads no more reads for its guest, field by field.
const LONGEST_FIELD: usize = 8;

/// SET_CONFIG. Only `writeback` can be written, which switches the write cache.
pub(super) fn write(engine: &Engine, offset: u32, bytes: &[u8]) -> Result<(), Error> {
    match (usize::try_from(offset), bytes) {
        (Ok(WRITEBACK), &[value @ (0 | 1)]) => engine.set_write_cache(value == 1).map_err(Error::Engine),
        _ => Err(Error::ReadOnlyConfig),
    }
}

/// Sets the write cache according to the acknowledged features. It is off for a driver that cannot flush (virtio 1.2
/// §5.2.6.2), and has the drive's initial setting for any other.
pub(super) fn apply_features(engine: &Engine, acked: VirtioFeatures) {
    let disk = engine.geometry();
    let on = disk.cache_on && acked.contains(VirtioFeatures::FLUSH);
    if disk.volatile_cache
        && let Err(error) = engine.set_write_cache(on)
    {
        LOG.warn(|| format!("the driver does not flush, but {error}; it may lose writes when power fails"));
    }
}

fn slice(config: &BlkConfig, offset: usize, size: usize) -> Vec<u8> {
    config.as_bytes().iter().copied().chain(std::iter::repeat(0)).skip(offset).take(size).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::{DiscardLimits, ZeroesLimits, ZoneGeometry};

    pub(crate) fn geometry() -> Geometry {
        Geometry {
            blocks: 0x1000,
            block_size: 4096,
            physical_block_size: 16384,
            alignment_offset: 8192,
            optimal_size: 128 << 10,
            boundary: 0,
            read_only: false,
            volatile_cache: true,
            cache_on: true,
            serial: "S1".into(),
            model: "disk".into(),
            max_transfer: 128 << 10,
            discard: Some(DiscardLimits { ranges: 32, range_blocks: 1000, blocks: u64::MAX }),
            zeroes: Some(ZeroesLimits { blocks: 32, deallocates: true }),
            zones: Some(ZoneGeometry { blocks: 0x100, max_open: 7, max_active: 9, max_append: 1 << 20 }),
        }
    }

    fn config() -> BlkConfig {
        BlkConfig::new(&geometry(), 3, true)
    }

    fn field(offset: usize, size: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&slice(&config(), offset, size));
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn each_field_has_the_offset_of_the_specification() {
        let fields = [("capacity", 0, 8), ("size_max", 8, 4), ("seg_max", 12, 4), ("blk_size", 20, 4)];
        let values = fields.map(|(_, offset, size)| field(offset, size));
        assert_eq!(values, [0x8000, 128 << 10, 126, 4096]);

        let topology = [field(24, 1), field(25, 1), field(26, 2), field(28, 4)];
        assert_eq!(topology, [2, 2, 4, 32], "16K physical blocks are four logical ones");

        assert_eq!((field(32, 1), field(34, 2)), (1, 3), "writeback, num_queues");
        assert_eq!(WRITEBACK, 32);

        assert_eq!([field(36, 4), field(40, 4), field(44, 4)], [8000, 32, 8], "discard, in sectors of 512");
        assert_eq!([field(48, 4), field(52, 4), field(56, 1)], [32 * 16 * 8, 16, 1], "write-zeroes");

        assert_eq!([field(72, 4), field(76, 4), field(80, 4)], [0x800, 7, 9], "zone_sectors, limits");
        assert_eq!([field(84, 4), field(88, 4), field(92, 1)], [128, 4096, 1], "appends, granularity, host-managed");
        assert_eq!(ZONES_END, 96);
    }

    #[test]
    fn a_disk_without_zones_has_no_characteristics_of_zones() {
        let geometry = Geometry { zones: None, ..geometry() };
        let config = BlkConfig::new(&geometry, 3, true);
        assert_eq!(slice(&config, 57, 39), [0; 39]);
    }

    #[test]
    fn any_range_can_be_read_and_is_zero_past_the_end() {
        let whole = slice(&config(), 0, 96);
        for offset in 0..100 {
            for size in [1, 3, 57, 96] {
                let expected: Vec<u8> = (offset..offset + size).map(|i| whole.get(i).copied().unwrap_or(0)).collect();
                assert_eq!(slice(&config(), offset, size), expected, "offset {offset} size {size}");
            }
        }
    }
}
