//! The words of a block request (virtio 1.2 §5.2.6): what it does, how it ends, what is wrong with it, and the disk that it
//! is checked against.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::addr::{Gpa, Iova, Span};
use crate::driver::{Blocks, Command, DiscardLimits, Geometry, ZeroesLimits};
use crate::engine::live_geometry::LiveGeometry;
use crate::engine::virtqueue::chain::ChainFault;

/// Most segments of a write-zeroes request, and most commands that one of them may take: a request is never more than 256
/// commands, which a device gets done while somebody waits for a ring to stop.
const ZEROES_SEGMENTS: u32 = 16;
const ZEROES_COMMANDS: u32 = 16;

/// The unit of `sector`, whatever the block size (virtio 1.2 §5.2.6).
pub(in crate::engine) const SECTOR_SHIFT: u32 = 9;
/// Bytes of the header.
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

/// How a request ended, as the driver reads it (virtio 1.2 §5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestFault {
    /// The chain itself.
    #[error(transparent)]
    Chain(#[from] ChainFault),
    /// No byte for the status, or not in guest memory.
    #[error("no writable byte for the status")]
    NoStatus,
    /// Fewer than 16 readable bytes, or not in guest memory.
    #[error("no readable header of 16 bytes")]
    NoHeader,
    /// A data buffer is not guest memory.
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
    /// Not a whole number of logical blocks.
    #[error("{bytes} bytes at sector {sector}: not whole blocks of {block_size}")]
    Alignment {
        /// First sector.
        sector: u64,
        /// Bytes of data.
        bytes: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// Past the end of the disk.
    #[error("{bytes} bytes at sector {sector} of a disk of {sectors} sectors")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes of data.
        bytes: u64,
        /// Sectors of the disk.
        sectors: u64,
    },
    /// No list of segments, or one too long.
    #[error("a list of {bytes} bytes: wanted 1 to {segments} segments of 16 bytes")]
    SegmentList {
        /// Its length.
        bytes: u64,
        /// Most segments.
        segments: u32,
    },
    /// A segment longer than the configuration space allows.
    #[error("a segment of {sectors} sectors; at most {limit} can be")]
    SegmentLength {
        /// Its length.
        sectors: u32,
        /// The limit.
        limit: u32,
    },
    /// A write to a read-only disk.
    #[error("a write to a read-only disk")]
    ReadOnly,
}

/// The disk, in the units that requests use.
#[derive(Clone, Debug)]
pub struct Disk {
    live: Arc<LiveGeometry>,
    block_size: u32,
    block_shift: u32,
    read_only: bool,
    pub(in crate::engine) discard: Option<RangeLimits>,
    pub(in crate::engine) zeroes: Option<RangeLimits>,
    pub(in crate::engine) discard_command: Option<DiscardLimits>,
    pub(in crate::engine) zeroes_command: Option<ZeroesLimits>,
    id: [u8; ID_BYTES],
}

impl Disk {
    /// The disk that `geometry` describes, but for what is `changing`.
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
            read_only: geometry.read_only,
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

    /// True while a flush is for the device: it has a volatile write cache, and it is on.
    #[inline]
    #[must_use]
    pub fn cache_on(&self) -> bool {
        self.live.cache_on.load(Ordering::Relaxed)
    }

    /// Bytes of a logical block, as a shift.
    #[must_use]
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// The command that moves the `bytes` bytes from `position` on of a request that starts at `block`.
    #[inline]
    pub(in crate::engine) fn transfer(&self, operation: Operation, block: u64, position: u64, bytes: u32) -> Command {
        let (block, count) = (block + (position >> self.block_shift), bytes >> self.block_shift);
        if operation == Operation::Read { Command::Read { block, count } } else { Command::Write { block, count } }
    }

    /// The transfer that a request of type `kind` is, whose data the device may write or not; `None` if it is none, or one that
    /// is refused.
    #[inline]
    pub(in crate::engine) fn transfer_of(&self, kind: u32, writable: bool) -> Option<Operation> {
        match (kind, writable) {
            (T_IN, true) => Some(Operation::Read),
            (T_OUT, false) if !self.read_only => Some(Operation::Write),
            _ => None,
        }
    }

    /// The first block of a transfer, if all of it exists.
    #[inline]
    pub(in crate::engine) fn block(&self, sector: u64, bytes: u64) -> Result<u64, RequestFault> {
        let sectors_per_block = 1 << (self.block_shift - SECTOR_SHIFT);
        if bytes & u64::from(self.block_size - 1) != 0 || sector & (sectors_per_block - 1) != 0 {
            return Err(RequestFault::Alignment { sector, bytes, block_size: self.block_size });
        }
        let sectors = self.live.blocks.load(Ordering::Relaxed) << (self.block_shift - SECTOR_SHIFT);
        match sectors.checked_sub(sector) {
            Some(left) if bytes >> SECTOR_SHIFT <= left => Ok(sector >> (self.block_shift - SECTOR_SHIFT)),
            _ => Err(RequestFault::Range { sector, bytes, sectors }),
        }
    }
}

/// Which way the data goes, seen from the disk.
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
}

/// What a request is about, beside its header. Reused, so that its vectors keep their capacity.
#[derive(Debug, Default)]
pub struct Data {
    /// Its data, as the device names it.
    pub buffers: Vec<Span<Iova>>,
    /// The blocks of a discard or write-zeroes request.
    pub ranges: Vec<Blocks>,
}

/// What is to be done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Something for the device, with `bytes` of data from `block` on (both 0 for a flush). For a discard, `bytes` is the
    /// number of ranges; for write-zeroes, the bytes in all of them.
    Device {
        /// What.
        operation: Operation,
        /// First logical block.
        block: u64,
        /// Bytes of data, whole blocks.
        bytes: u64,
    },
    /// The identity string is to be copied into the buffers.
    Identify,
    /// Nothing: this is the answer.
    Answer(Status),
    /// Nothing: it cannot be done.
    Refuse(RequestFault),
}

/// What one request may ask for, as the configuration space tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Most segments.
    pub segments: u32,
    /// Most sectors of 512 bytes in one of them; whole blocks.
    pub sectors: u32,
}

impl RangeLimits {
    fn new(segments: u32, blocks: u32, geometry: &Geometry) -> Self {
        let sectors_per_block = geometry.block_size >> SECTOR_SHIFT;
        Self { segments, sectors: blocks.min(u32::MAX / sectors_per_block) * sectors_per_block }
    }

    /// For discard, if the disk can do it: what one command can take.
    #[must_use]
    pub fn discard(geometry: &Geometry) -> Option<Self> {
        let DiscardLimits { ranges, range_blocks, .. } = geometry.discard.filter(|_| !geometry.read_only)?;
        Some(Self::new(ranges.into(), range_blocks, geometry))
    }

    /// For write-zeroes, if the disk can do it: a few commands of the longest.
    #[must_use]
    pub fn write_zeroes(geometry: &Geometry) -> Option<Self> {
        let limits = geometry.zeroes.filter(|_| !geometry.read_only)?;
        Some(Self::new(ZEROES_SEGMENTS, limits.blocks.saturating_mul(ZEROES_COMMANDS), geometry))
    }
}
