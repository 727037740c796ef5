//! Scatter Gather Lists, the alternative to PRPs (NVMe 2.0 §4.1.2).
//!
//! ```text
//! SQE bytes 24..40   data block                                     all data in one piece
//!                  | segment --> [data, data, .., segment] --> ..   more descriptors, the last one points to the next segment
//!                  | last segment --> [data, data, .., data]
//! ```
//!
//! The lengths of the data blocks must add up to the length of the transfer.

use crate::addr::{Iova, Span};

use super::dma::Dma;
use super::wire::{Entry, Status, halves};

/// SGLS of Identify Controller: supported, data blocks of any alignment (NVMe 2.0 §5.17.2.1, bytes 539:536).
pub(super) const SUPPORT: u32 = 0b01;

const DESCRIPTOR_BYTES: u64 = 16;
/// Most segments of one command. Limits the walk of a cyclic list.
const MAX_SEGMENTS: usize = 256;

/// An SGL descriptor: address, length, reserved bytes, identifier (NVMe 2.0 §4.1.2.1).
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u64,
    identifier: u8,
}

impl Descriptor {
    fn new(low: u64, high: u64) -> Self {
        Self { address: low, len: halves(high).0.into(), identifier: high.to_le_bytes()[7] }
    }

    fn kind(self) -> Result<Kind, Status> {
        match self.identifier {
            0x00 => Ok(Kind::Data),
            0x20 => Ok(Kind::Segment),
            0x30 => Ok(Kind::LastSegment),
            _ => Err(Status::SGL_TYPE_INVALID),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Segment,
    LastSegment,
}

/// The data pointer of one command.
pub(super) struct Sgl {
    first: Descriptor,
    len: u64,
}

impl Sgl {
    /// The buffer of `len` bytes that `entry` describes.
    pub(super) fn new(entry: &Entry, len: u64) -> Self {
        Self { first: Descriptor::new(entry.u64(24), entry.u64(32)), len }
    }

    /// Calls `part` for each piece of the buffer in order.
    pub(super) fn walk(
        &self,
        dma: &Dma<'_>,
        hint: &mut usize,
        mut part: impl FnMut(Span<Iova>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let mut rest = self.len;
        let mut data = |block: Descriptor| {
            rest = rest.checked_sub(block.len).ok_or(Status::SGL_LENGTH_INVALID)?;
            if block.len == 0 {
                return Ok(());
            }
            part(Span::new(Iova(block.address), block.len).ok_or(Status::DATA_TRANSFER_ERROR)?)
        };
        let mut next = Some(self.first);
        if self.first.kind()? == Kind::Data {
            data(self.first)?;
            next = None;
        }
        for _ in 0..MAX_SEGMENTS {
            let Some(segment) = next else { break };
            next = walk_segment(segment, dma, hint, &mut data)?;
        }
        match next {
            Some(_) => Err(Status::SGL_COUNT_INVALID),
            None if rest != 0 => Err(Status::SGL_LENGTH_INVALID),
            None => Ok(()),
        }
    }
}

/// Calls `data` for each data block of `segment` and returns the next segment.
fn walk_segment(
    segment: Descriptor,
    dma: &Dma<'_>,
    hint: &mut usize,
    data: &mut impl FnMut(Descriptor) -> Result<(), Status>,
) -> Result<Option<Descriptor>, Status> {
    if segment.len == 0 || !segment.len.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(Status::SGL_SEGMENT_INVALID);
    }
    let last_segment = segment.kind()? == Kind::LastSegment;
    let count = segment.len / DESCRIPTOR_BYTES;
    for n in 0..count {
        let at = segment.address.checked_add(n * DESCRIPTOR_BYTES).ok_or(Status::SGL_SEGMENT_INVALID)?;
        let mut bytes = [0; 16];
        dma.read(Iova(at), &mut bytes, hint)?;
        let (low, high) = bytes.split_at(8);
        let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("eight bytes"));
        let descriptor = Descriptor::new(word(low), word(high));
        match descriptor.kind()? {
            Kind::Data => data(descriptor)?,
            _ if !last_segment && n + 1 == count => return Ok(Some(descriptor)),
            _ => return Err(Status::SGL_SEGMENT_INVALID),
        }
    }
    // Any segment but the last must end with the descriptor of the next.
    if last_segment { Ok(None) } else { Err(Status::SGL_SEGMENT_INVALID) }
}
