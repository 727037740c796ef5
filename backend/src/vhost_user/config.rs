//! The configuration space of the disk, as the guest reads it (virtio 1.2 §5.2.4).
//!
//! It never changes while the device lives, so it is built per request from the drive's geometry.

use zerocopy::{Immutable, IntoBytes};

use crate::driver::Geometry;

/// Buffers per request: an indirect table of 128 descriptors without those of header and status.
pub(super) const SEG_MAX: u32 = 126;

/// Bytes per unit of `capacity` (virtio 1.2 §5.2.4).
const SECTOR: u64 = 512;

/// `struct virtio_blk_config` up to the first field after `num_queues`; the rest belongs to features that are not offered and reads as zero.
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
}

impl BlkConfig {
    fn new(geometry: &Geometry, queues: u16) -> Self {
        let ratio = (geometry.physical_block_size / geometry.block_size).max(1);
        Self {
            capacity: geometry.blocks.saturating_mul(u64::from(geometry.block_size) / SECTOR),
            size_max: 0,
            seg_max: SEG_MAX,
            cylinders: 0,
            heads: 0,
            sectors: 0,
            blk_size: geometry.block_size,
            physical_block_exp: u8::try_from(ratio.ilog2()).expect("a logarithm of 32 bits"),
            alignment_offset: 0,
            min_io_size: u16::try_from(ratio).unwrap_or(u16::MAX),
            opt_io_size: 0,
            writeback: 0,
            unused: 0,
            num_queues: queues,
            max_discard_sectors: 0,
        }
    }
}

/// `size` bytes of configuration space from `offset`; zero past its end.
pub(super) fn read(geometry: &Geometry, queues: u16, offset: usize, size: usize) -> Vec<u8> {
    let config = BlkConfig::new(geometry, queues);
    config.as_bytes().iter().copied().chain(std::iter::repeat(0)).skip(offset).take(size).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn geometry() -> Geometry {
        Geometry {
            blocks: 0x1000,
            block_size: 4096,
            physical_block_size: 16384,
            read_only: false,
            volatile_cache: true,
            serial: "S1".into(),
            model: "disk".into(),
        }
    }

    fn field(offset: usize, size: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&read(&geometry(), 3, offset, size));
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn each_field_stands_where_the_specification_puts_it() {
        let fields = [("capacity", 0, 8), ("size_max", 8, 4), ("seg_max", 12, 4), ("blk_size", 20, 4)];
        let values = fields.map(|(_, offset, size)| field(offset, size));
        assert_eq!(values, [0x8000, 0, 126, 4096]);

        let topology = [field(24, 1), field(25, 1), field(26, 2), field(28, 4)];
        assert_eq!(topology, [2, 0, 4, 0], "16K physical blocks are four logical ones");

        assert_eq!(field(34, 2), 3, "num_queues");
    }

    #[test]
    fn any_part_can_be_read_and_is_zero_past_the_end() {
        let whole = read(&geometry(), 3, 0, 60);
        for offset in 0..70 {
            for size in [1, 3, 57, 60] {
                let expected: Vec<u8> = (offset..offset + size).map(|i| whole.get(i).copied().unwrap_or(0)).collect();
                assert_eq!(read(&geometry(), 3, offset, size), expected, "offset {offset} size {size}");
            }
        }
    }
}
