//! Discard and write-zeroes (virtio 1.2 §5.2.6): requests whose data is a list of segments. The list is copied once, checked
//! against the limits in the configuration space, and converted to block ranges.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::types::{Data, Disk, Job, Operation, RangeLimits, RequestFault, SECTOR_SHIFT, Status};
use crate::driver::{Blocks, DiscardLimits};
use crate::engine::guest_memory::GuestMemoryView;

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
const UNMAP: u32 = 1;
/// Bytes of the longest list: one segment for each range of an NVMe discard (Dataset Management) command.
const LONGEST_LIST: usize = 256 * size_of::<Segment>();

/// `struct virtio_blk_discard_write_zeroes`
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// The request type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Kind {
    Discard,
    WriteZeroes,
}

/// Converts the list of `bytes` bytes in `data.buffers` to `data.ranges`, and clears `data.buffers`.
pub(in crate::engine) fn job(
    kind: Kind,
    bytes: u64,
    guest: &GuestMemoryView,
    disk: &Disk,
    data: &mut Data,
) -> Result<Job, RequestFault> {
    let limits = if kind == Kind::Discard { disk.discard } else { disk.zeroes };
    let Some(limits) = limits else { return Ok(Job::Answer(Status::Unsupported)) };
    let mut list = [0; LONGEST_LIST];
    let most = u64::from(limits.segments) * size_of::<Segment>() as u64;
    let list = usize::try_from(bytes).ok().filter(|_| bytes <= most).and_then(|bytes| list.get_mut(..bytes));
    let list = list.filter(|list| !list.is_empty() && list.len().is_multiple_of(size_of::<Segment>()));
    let list = list.ok_or(RequestFault::SegmentList { bytes, segments: limits.segments })?;
    guest.gather(&data.buffers, list);
    data.buffers.clear();
    let mut unmap = true;
    for segment in list.chunks_exact(size_of::<Segment>()) {
        let segment = Segment::read_from_bytes(segment).expect("cut to its size");
        // Unknown flags, and UNMAP in a discard: VIRTIO_BLK_S_UNSUPP (virtio 1.2 §5.2.6.2).
        let known = if kind == Kind::WriteZeroes { UNMAP } else { 0 };
        if segment.flags & !known != 0 {
            return Ok(Job::Answer(Status::Unsupported));
        }
        unmap &= segment.flags & UNMAP != 0;
        data.ranges.extend(blocks(segment, limits, disk)?);
    }
    Ok(match kind {
        _ if data.ranges.is_empty() => Job::Answer(Status::Ok),
        Kind::Discard => Job::Device { operation: Operation::Discard, block: 0, bytes: data.ranges.len() as u64 },
        Kind::WriteZeroes => {
            let blocks: u64 = data.ranges.iter().map(|range| u64::from(range.count)).sum();
            let deallocates = disk.zeroes_command.is_some_and(|limits| limits.deallocates);
            let operation = Operation::WriteZeroes { unmap: unmap && deallocates };
            Job::Device { operation, block: 0, bytes: blocks << disk.block_shift() }
        }
    })
}

/// The blocks of a segment. `None` if it is empty.
fn blocks(segment: Segment, limits: RangeLimits, disk: &Disk) -> Result<Option<Blocks>, RequestFault> {
    let Segment { sector, sectors, .. } = segment;
    if sectors > limits.sectors {
        return Err(RequestFault::SegmentLength { sectors, limit: limits.sectors });
    }
    let bytes = u64::from(sectors) << SECTOR_SHIFT;
    let first = disk.block(sector, bytes)?;
    let count = u32::try_from(bytes >> disk.block_shift()).expect("fewer blocks than sectors");
    Ok((count != 0).then_some(Blocks { first, count }))
}

/// How many of `ranges` fit the next discard command.
pub(in crate::engine) fn batch(ranges: &[Blocks], limits: DiscardLimits) -> usize {
    let mut left = limits.blocks;
    let fits = |range: &&Blocks| {
        let rest = left.checked_sub(u64::from(range.count));
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    // One range always fits: `limits.range_blocks` is at most `limits.blocks`.
    ranges.iter().take(limits.ranges.into()).take_while(fits).count().max(1)
}

/// The next write-zeroes command: the blocks after the first `done` blocks in `ranges`, at most `limit`.
pub(in crate::engine) fn next(ranges: &[Blocks], done: u64, limit: u32) -> Blocks {
    let mut skip = done;
    for &Blocks { first, count } in ranges {
        if skip < u64::from(count) {
            let left = u32::try_from(u64::from(count) - skip).expect("less than a count");
            return Blocks { first: first + skip, count: left.min(limit) };
        }
        skip -= u64::from(count);
    }
    unreachable!("a request has more than {done} blocks in its ranges")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Geometry;

    fn range(first: u64, count: u32) -> Blocks {
        Blocks { first, count }
    }

    #[test]
    fn a_discard_command_has_as_many_ranges_and_blocks_as_the_limits_allow() {
        let ranges = [range(0, 10), range(20, 10), range(40, 10)];
        let limits = DiscardLimits { ranges: 256, range_blocks: 10, blocks: u64::MAX };
        assert_eq!(batch(&ranges, limits), 3);
        assert_eq!(batch(&ranges, DiscardLimits { ranges: 2, ..limits }), 2);
        assert_eq!(batch(&ranges, DiscardLimits { blocks: 29, ..limits }), 2);
        assert_eq!(batch(&ranges, DiscardLimits { blocks: 10, ..limits }), 1);
    }

    #[test]
    fn each_write_zeroes_command_starts_where_the_last_one_ended() {
        let ranges = [range(100, 5), range(7, 3)];
        let mut commands = Vec::new();
        let mut done = 0;
        while done < 8 {
            let blocks = next(&ranges, done, 4);
            done += u64::from(blocks.count);
            commands.push(blocks);
        }
        assert_eq!(commands, [range(100, 4), range(104, 1), range(7, 3)]);
    }

    #[test]
    fn limits_are_whole_blocks_and_absent_for_a_read_only_disk() {
        let discard = Some(DiscardLimits { ranges: 4, range_blocks: u32::MAX, blocks: u64::MAX });
        let geometry = Geometry { block_size: 4096, discard, ..Geometry::default() };
        let limits = RangeLimits::discard(&geometry).unwrap();
        assert_eq!((limits.segments, limits.sectors), (4, u32::MAX - 7));
        assert_eq!(RangeLimits::discard(&Geometry { read_only: true, ..geometry.clone() }), None);
        assert_eq!(RangeLimits::write_zeroes(&geometry), None);
    }
}
