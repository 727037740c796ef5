//! From a chain to a request of the block device (virtio 1.2 §5.2.6): a 16-byte header, data, a status byte. The cut
//! between descriptors means nothing (§2.7.4.1), so the header is the first 16 readable bytes, the status the last writable
//! one, and data what remains.
//!
//! Every question about the guest's claims is asked here, once; what leaves this file names guest memory and blocks that
//! exist. A chain taken is a debt: its [`Ticket`] must be settled with a used entry.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Changing;
use super::chain::{Chain, ChainFault};
use super::guest::Guest;
use super::ranges::{self, Kind, RangeLimits};
use super::ticket::Ticket;
use crate::addr::{Gpa, Iova, Span};
use crate::driver::{Blocks, Command, DiscardLimits, Geometry, ZeroesLimits};

/// The unit of `sector`, whatever the block size (virtio 1.2 §5.2.6).
pub(super) const SECTOR_SHIFT: u32 = 9;
/// Bytes of the header.
pub(super) const HEADER: u64 = 16;
/// Bytes of the identity string, virtio 1.2 §5.2.6.
pub const ID_BYTES: usize = 20;

// Request types, virtio 1.2 §5.2.6.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

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

/// `struct virtio_blk_req` up to the data.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
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
    changing: Arc<Changing>,
    block_size: u32,
    block_shift: u32,
    read_only: bool,
    pub(super) discard: Option<RangeLimits>,
    pub(super) zeroes: Option<RangeLimits>,
    pub(super) discard_command: Option<DiscardLimits>,
    pub(super) zeroes_command: Option<ZeroesLimits>,
    id: [u8; ID_BYTES],
}

impl Disk {
    /// The disk that `geometry` describes, but for what is `changing`.
    #[must_use]
    pub fn new(geometry: &Geometry, changing: Arc<Changing>) -> Self {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(geometry.serial.bytes()) {
            *to = from;
        }
        let block_shift = geometry.block_size.trailing_zeros();
        Self {
            changing,
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

    /// Bytes of a logical block, as a shift.
    #[must_use]
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// The command that moves the `bytes` bytes from `position` on of a request that starts at `block`.
    #[inline]
    pub(super) fn transfer(&self, operation: Operation, block: u64, position: u64, bytes: u32) -> Command {
        let (block, count) = (block + (position >> self.block_shift), bytes >> self.block_shift);
        if operation == Operation::Read { Command::Read { block, count } } else { Command::Write { block, count } }
    }

    /// The transfer that a request of type `kind` is, whose data the device may write or not; `None` if it is none, or one that
    /// is refused.
    #[inline]
    pub(super) fn transfer_of(&self, kind: u32, writable: bool) -> Option<Operation> {
        match (kind, writable) {
            (T_IN, true) => Some(Operation::Read),
            (T_OUT, false) if !self.read_only => Some(Operation::Write),
            _ => None,
        }
    }

    /// The first block of a transfer, if all of it exists.
    #[inline]
    pub(super) fn block(&self, sector: u64, bytes: u64) -> Result<u64, RequestFault> {
        let sectors_per_block = 1 << (self.block_shift - SECTOR_SHIFT);
        if bytes & u64::from(self.block_size - 1) != 0 || sector & (sectors_per_block - 1) != 0 {
            return Err(RequestFault::Alignment { sector, bytes, block_size: self.block_size });
        }
        let sectors = self.changing.blocks.load(Ordering::Relaxed) << (self.block_shift - SECTOR_SHIFT);
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

/// Turns a chain into a request; `data` receives what it is about.
#[inline]
pub fn parse(chain: &Chain, guest: &mut Guest, disk: &Disk, data: &mut Data) -> (Ticket, Job) {
    data.buffers.clear();
    data.ranges.clear();
    let status = chain.last_writable().filter(|&byte| guest.has_status(byte));
    let ticket = Ticket::new(chain.head(), status);
    if let Some(fault) = chain.fault() {
        return (ticket, Job::Refuse(fault.into()));
    }
    if status.is_none() {
        return (ticket, Job::Refuse(RequestFault::NoStatus));
    }
    let job = job(chain, guest, disk, data).unwrap_or_else(Job::Refuse);
    (ticket, job)
}

#[inline]
fn job(chain: &Chain, guest: &mut Guest, disk: &Disk, data: &mut Data) -> Result<Job, RequestFault> {
    let buffers = &mut data.buffers;
    let header: Header = guest.read_header(chain.readable()).ok_or(RequestFault::NoHeader)?;
    match header.kind {
        T_IN => {
            if total(chain.readable()) != HEADER {
                return Err(RequestFault::Direction);
            }
            let bytes = collect_writable(chain, guest, buffers)?;
            transfer(Operation::Read, disk.block(header.sector, bytes)?, bytes)
        }
        T_OUT => {
            if total(chain.writable()) != 1 {
                return Err(RequestFault::Direction);
            }
            if disk.read_only {
                return Err(RequestFault::ReadOnly);
            }
            let bytes = collect_readable(chain, guest, buffers)?;
            transfer(Operation::Write, disk.block(header.sector, bytes)?, bytes)
        }
        T_DISCARD => range_job(Kind::Discard, chain, guest, disk, data),
        T_WRITE_ZEROES => range_job(Kind::WriteZeroes, chain, guest, disk, data),
        T_FLUSH if disk.changing.cache_on.load(Ordering::Relaxed) => {
            Ok(Job::Device { operation: Operation::Flush, block: 0, bytes: 0 })
        }
        T_FLUSH => Ok(Job::Answer(Status::Ok)),
        T_GET_ID => {
            collect_writable(chain, guest, buffers)?;
            Ok(Job::Identify)
        }
        _ => Ok(Job::Answer(Status::Unsupported)),
    }
}

#[cold]
fn range_job(kind: Kind, chain: &Chain, guest: &mut Guest, disk: &Disk, data: &mut Data) -> Result<Job, RequestFault> {
    if total(chain.writable()) != 1 {
        return Err(RequestFault::Direction);
    }
    if disk.read_only {
        return Err(RequestFault::ReadOnly);
    }
    let bytes = collect_readable(chain, guest, &mut data.buffers)?;
    ranges::job(kind, bytes, guest, disk, data)
}

/// A transfer of nothing is done already; the device has no command for it.
#[inline]
fn transfer(operation: Operation, block: u64, bytes: u64) -> Result<Job, RequestFault> {
    Ok(if bytes == 0 { Job::Answer(Status::Ok) } else { Job::Device { operation, block, bytes } })
}

/// The sum of at most 2048 lengths of 32 bits each: it cannot overflow.
#[inline]
fn total(spans: &[Span<Gpa>]) -> u64 {
    spans.iter().map(Span::len).sum()
}

/// All writable bytes but the last, the status.
#[inline]
fn collect_writable(chain: &Chain, guest: &mut Guest, buffers: &mut Vec<Span<Iova>>) -> Result<u64, RequestFault> {
    let Some((last, whole)) = chain.writable().split_last() else { return Ok(0) };
    let mut bytes = collect(whole.iter().copied(), guest, buffers)?;
    if let Some(cut) = last.slice(0, last.len() - 1) {
        bytes += collect([cut].into_iter(), guest, buffers)?;
    }
    Ok(bytes)
}

/// All readable bytes but the header.
#[inline]
fn collect_readable(chain: &Chain, guest: &mut Guest, buffers: &mut Vec<Span<Iova>>) -> Result<u64, RequestFault> {
    let mut header = HEADER;
    let data = chain.readable().iter().filter_map(|span| {
        let skip = header.min(span.len());
        header -= skip;
        span.slice(skip, span.len() - skip)
    });
    collect(data, guest, buffers)
}

#[inline]
fn collect(
    spans: impl Iterator<Item = Span<Gpa>>,
    guest: &mut Guest,
    buffers: &mut Vec<Span<Iova>>,
) -> Result<u64, RequestFault> {
    let mut bytes = 0;
    for span in spans {
        let found = guest.data(span).ok_or(RequestFault::Memory { start: span.start(), len: span.len() })?;
        buffers.push(found);
        bytes += span.len();
    }
    Ok(bytes)
}
