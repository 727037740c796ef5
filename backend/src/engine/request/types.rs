//! Types of block requests (virtio 1.2 §5.2.6): operations, statuses, faults, and the disk that requests are checked
//! against.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::disk_bounds::DiskBounds;
use super::disk_zones::DiskZones;
use crate::addr::{Gpa, Iova, Span};
use crate::driver::{Blocks, Command, Direction, DiscardLimits, Geometry, ZeroesLimits, ZoneAction};
use crate::engine::live_geometry::LiveGeometry;
use crate::engine::virtqueue::chain::ChainFault;

/// Most segments of a write-zeroes request, and most commands per segment. So a request is at most 256 commands, which a device
/// completes within the drain time-out.
const ZEROES_SEGMENTS: u32 = 16;
const ZEROES_COMMANDS: u32 = 16;

/// Bytes of a bounce buffer: the longest command whose data are not where the guest has them.
pub const BOUNCE_BYTES: u32 = 64 << 10;

/// The unit of `sector`, whatever the block size (virtio 1.2 §5.2.6).
pub(in crate::engine) const SECTOR_SHIFT: u32 = 9;
/// Bytes of a request's header.
pub(in crate::engine) const HEADER: u64 = 16;
/// Bytes of the identity string, virtio 1.2 §5.2.6.
pub const ID_BYTES: usize = 20;

// Request types, virtio 1.2 §5.2.6.
pub(in crate::engine) const T_IN: u32 = 0;
pub(in crate::engine) const T_OUT: u32 = 1;
pub(in crate::engine) const T_FLUSH: u32 = 4;
pub(in crate::engine) const T_GET_ID: u32 = 8;
pub(in crate::engine) const T_DISCARD: u32 = 11;
pub(in crate::engine) const T_WRITE_ZEROES: u32 = 13;

/// Status byte of a request (virtio 1.2 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
    /// VIRTIO_BLK_S_ZONE_INVALID_CMD (virtio 1.3 §5.2.6, as the following)
    ZoneInvalidCommand = 3,
    /// VIRTIO_BLK_S_ZONE_UNALIGNED_WP
    ZoneUnalignedWritePointer = 4,
    /// VIRTIO_BLK_S_ZONE_OPEN_RESOURCE
    ZoneOpenResource = 5,
    /// VIRTIO_BLK_S_ZONE_ACTIVE_RESOURCE
    ZoneActiveResource = 6,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// The chain is invalid.
    #[error(transparent)]
    Chain(#[from] ChainFault),
    /// There is no status byte, or it is not in guest memory.
    #[error("no writable byte for the status")]
    NoStatus,
    /// There are fewer than 16 readable bytes, or they are not in guest memory.
    #[error("no readable header of 16 bytes")]
    NoHeader,
    /// A data buffer is not in guest memory.
    #[error("a data buffer of {len} bytes at {start}, which is not guest memory")]
    Memory {
        /// Its start.
        start: Gpa,
        /// Its length.
        len: u64,
    },
    /// Readable data in a read, or writable data in a write.
    #[error("data buffers of the wrong direction")]
    Direction,
    /// The transfer is not a whole number of logical blocks.
    #[error("{bytes} bytes at sector {sector}: not whole blocks of {block_size} bytes")]
    Alignment {
        /// First sector.
        sector: u64,
        /// Bytes of data.
        bytes: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The transfer ends past the end of the disk.
    #[error("{bytes} bytes at sector {sector} of a disk of {sectors} sectors")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes of data.
        bytes: u64,
        /// Sectors of the disk.
        sectors: u64,
    },
    /// The list of segments is empty, too long, or not a whole number of segments.
    #[error("a list of {bytes} bytes; expected 1 to {segments} segments of 16 bytes")]
    SegmentList {
        /// Its length.
        bytes: u64,
        /// Largest number of segments.
        segments: u32,
    },
    /// A segment is longer than the configuration space allows.
    #[error("a segment of {sectors} sectors; the limit is {limit}")]
    SegmentLength {
        /// Its length.
        sectors: u32,
        /// The limit.
        limit: u32,
    },
    /// A write to a read-only disk.
    #[error("a write to a read-only disk")]
    ReadOnly,
    /// An append that the process before may have executed. Once more would be a second copy.
    #[error("an append in flight when the process before ended, which may have been executed")]
    MaybeAppended,
}

/// The disk, as requests are checked against it.
#[derive(Clone, Debug)]
pub struct Disk {
    live: Arc<LiveGeometry>,
    block_size: u32,
    block_shift: u32,
    /// log2 of the sectors of a logical block.
    sector_shift: u32,
    read_only: bool,
    /// See [`Geometry::boundary`].
    boundary: u32,
    /// The zones; `None` for an ordinary disk.
    pub(super) zones: Option<DiskZones>,
    pub(in crate::engine) discard: Option<RangeLimits>,
    pub(in crate::engine) zeroes: Option<RangeLimits>,
    pub(in crate::engine) discard_command: Option<DiscardLimits>,
    pub(in crate::engine) zeroes_command: Option<ZeroesLimits>,
    id: [u8; ID_BYTES],
}

impl Disk {
    /// The disk that `geometry` describes; its variable part is in `live`.
    #[must_use]
    pub fn new(geometry: &Geometry, live: Arc<LiveGeometry>) -> Self {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(geometry.serial.bytes()) {
            *to = from;
        }
        let block_shift = geometry.block_size.trailing_zeros();
        Self {
            live,
            block_size: geometry.block_size,
            block_shift,
            sector_shift: block_shift - SECTOR_SHIFT,
            read_only: geometry.read_only,
            boundary: geometry.boundary,
            zones: DiskZones::of(geometry, BOUNCE_BYTES),
            discard: RangeLimits::discard(geometry),
            zeroes: RangeLimits::write_zeroes(geometry),
            discard_command: geometry.discard,
            zeroes_command: geometry.zeroes,
            id,
        }
    }

    /// The serial number, padded with zeros.
    #[must_use]
    pub fn id(&self) -> &[u8; ID_BYTES] {
        &self.id
    }

    /// True if writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// True if the device has a volatile write cache and it is on, so that flushes must reach the device.
    #[inline]
    #[must_use]
    pub fn cache_on(&self) -> bool {
        self.live.cache_on.load(Ordering::Relaxed)
    }

    /// Bytes of a logical block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// True if the commands of one request must not be in flight together, because the device may execute them in any order.
    #[inline]
    pub(in crate::engine) fn is_in_order(&self, operation: Operation) -> bool {
        self.zones.is_some() && operation == Operation::Write
    }

    /// log2 of the bytes of a logical block.
    #[must_use]
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// The command for `bytes` bytes at offset `position` of a request that starts at `block`.
    #[inline]
    pub(in crate::engine) fn transfer(&self, operation: Operation, block: u64, position: u64, bytes: u32) -> Command {
        let (block, count) = (block + (position >> self.block_shift), bytes >> self.block_shift);
        match operation {
            Operation::Read => Command::Read { block, count },
            Operation::ZoneAppend => Command::ZoneAppend { block, count },
            Operation::ZoneReport => Command::ZoneReport { block },
            _ => Command::Write { block, count },
        }
    }

    /// True if no transfer crosses a boundary of the disk.
    #[inline]
    pub(in crate::engine) fn has_no_boundary(&self) -> bool {
        self.boundary == 0
    }

    /// At most `bytes`, such that a command at offset `position` of a request that starts at `block` crosses no boundary.
    #[inline]
    pub(in crate::engine) fn within_boundary(&self, block: u64, position: u64, bytes: u32) -> u32 {
        if self.boundary == 0 { bytes } else { self.to_boundary(block + (position >> self.block_shift), bytes) }
    }

    #[inline(never)]
    fn to_boundary(&self, block: u64, bytes: u32) -> u32 {
        let boundary = u64::from(self.boundary);
        let blocks = boundary - block % boundary;
        u32::try_from(blocks << self.block_shift).map_or(bytes, |most| bytes.min(most))
    }

    /// What transfers are checked against, as it is now: the device can change the size.
    #[inline]
    #[must_use]
    pub fn bounds(&self) -> DiskBounds {
        DiskBounds {
            sectors: self.live.blocks.load(Ordering::Relaxed) << self.sector_shift,
            in_block: self.block_size - 1,
            sector_shift: self.sector_shift,
            takes_writes: !self.read_only && self.zones.is_none(),
        }
    }

    /// [`DiskBounds::block`] of the disk as it is now.
    #[inline]
    pub(in crate::engine) fn block(&self, sector: u64, bytes: u64) -> Result<u64, RequestFault> {
        self.bounds().block(sector, bytes)
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// VIRTIO_BLK_T_IN
    Read,
    /// VIRTIO_BLK_T_OUT
    Write,
    /// VIRTIO_BLK_T_FLUSH
    Flush,
    /// VIRTIO_BLK_T_DISCARD
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES
    WriteZeroes {
        /// True if the blocks may be deallocated.
        unmap: bool,
    },
    /// VIRTIO_BLK_T_ZONE_APPEND
    ZoneAppend,
    /// VIRTIO_BLK_T_ZONE_REPORT
    ZoneReport,
    /// VIRTIO_BLK_T_ZONE_OPEN and the others that change the state of a zone
    ManageZone(ZoneAction),
}

impl From<Direction> for Operation {
    #[inline]
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Read => Self::Read,
            Direction::Write => Self::Write,
        }
    }
}

impl Operation {
    /// False if a request that may have been executed must not be executed again: its second execution would not be the same.
    #[must_use]
    pub fn is_repeatable(self) -> bool {
        self != Self::ZoneAppend
    }

    /// True for the requests that only zoned disks have.
    #[inline]
    #[must_use]
    pub fn is_on_zones(self) -> bool {
        matches!(self, Self::ZoneAppend | Self::ZoneReport | Self::ManageZone(_))
    }

    /// True if the device writes to memory.
    #[must_use]
    pub fn writes_memory(self) -> bool {
        matches!(self, Self::Read | Self::ZoneReport)
    }
}

/// Buffers and ranges of a request. Reused, so that the vectors keep their capacity.
#[derive(Debug, Default)]
pub struct Data {
    /// IOVAs of the data.
    pub buffers: Vec<Span<Iova>>,
    /// The blocks of a discard or write-zeroes request.
    pub ranges: Vec<Blocks>,
    /// IOVAs of `append_sector` of an append.
    pub append_sector: Vec<Span<Iova>>,
}

impl Data {
    /// Empties all of it.
    #[inline]
    pub fn clear(&mut self) {
        self.buffers.clear();
        self.ranges.clear();
        self.append_sector.clear();
    }
}

/// How a request is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// By the device, with `bytes` of data from `block` on (0 bytes for one without data). For a discard, `bytes` is the
    /// number of ranges; for write-zeroes, the bytes in all ranges.
    Device {
        /// The operation.
        operation: Operation,
        /// First logical block.
        block: u64,
        /// Bytes of data, whole blocks.
        bytes: u64,
    },
    /// By copying the identity string to the buffers.
    Identify,
    /// At once, with this status.
    Answer(Status),
    /// Not at all: it is completed with an error.
    Refuse(RequestFault),
}

/// Limits of one discard or write-zeroes request, as in the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Largest number of segments.
    pub segments: u32,
    /// Largest number of 512-byte sectors in a segment; whole blocks.
    pub sectors: u32,
}

impl RangeLimits {
    fn new(segments: u32, blocks: u32, geometry: &Geometry) -> Self {
        let sectors_per_block = geometry.block_size >> SECTOR_SHIFT;
        Self { segments, sectors: blocks.min(u32::MAX / sectors_per_block) * sectors_per_block }
    }

    /// Limits of discard: those of one NVMe command. `None` if the disk does not support it.
    #[must_use]
    pub fn discard(geometry: &Geometry) -> Option<Self> {
        let DiscardLimits { ranges, range_blocks, .. } = geometry.discard.filter(|_| !geometry.read_only)?;
        Some(Self::new(ranges.into(), range_blocks, geometry))
    }

    /// Limits of write-zeroes: up to `ZEROES_COMMANDS` NVMe commands per segment. `None` if the disk does not support it.
    #[must_use]
    pub fn write_zeroes(geometry: &Geometry) -> Option<Self> {
        let limits = geometry.zeroes.filter(|_| !geometry.read_only)?;
        Some(Self::new(ZEROES_SEGMENTS, limits.blocks.saturating_mul(ZEROES_COMMANDS), geometry))
    }
}
