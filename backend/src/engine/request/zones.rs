//! Requests of a zoned block device (virtio 1.3 §5.2.6): commands on zones, reports, appends, and what zones require of writes.

use zerocopy::{Immutable, IntoBytes};

use super::buffers::{collect_readable, collect_writable, total};
use super::disk_zones::DiskZones;
use super::types::{Data, Disk, HEADER, Job, Operation, RequestFault, SECTOR_SHIFT, Status};
use crate::driver::zones::{REPORT_HEADER, REPORT_ZONE, zones};
use crate::driver::{Zone, ZoneAction, ZoneFault};
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::chain::Chain;

// Request types, virtio 1.3 §5.2.6.
const T_APPEND: u32 = 15;
const T_REPORT: u32 = 16;
const T_OPEN: u32 = 18;
const T_CLOSE: u32 = 20;
const T_FINISH: u32 = 22;
const T_RESET: u32 = 24;
const T_RESET_ALL: u32 = 26;

/// Bytes of `append_sector`, the first that the device writes for an append.
const APPEND_SECTOR: usize = 8;
/// Bytes that the device writes, with the status, which is the last. The specification has no gap between the two; Linux has one,
/// because its `struct` is padded.
const APPEND_REPLY: std::ops::RangeInclusive<u64> = APPEND_SECTOR as u64 + 1..=2 * APPEND_SECTOR as u64;

/// `struct virtio_blk_zone_report` up to the zones.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct ReportHeader {
    nr_zones: u64,
    reserved: [u8; 56],
}

/// `struct virtio_blk_zone_descriptor`
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    z_cap: u64,
    z_start: u64,
    z_wp: u64,
    z_type: u8,
    z_state: u8,
    reserved: [u8; 38],
}

// A zone takes as many bytes here as in the device's report.
const _: () =
    assert!(size_of::<ReportHeader>() as u64 == REPORT_HEADER && size_of::<Descriptor>() as u64 == REPORT_ZONE);

/// VIRTIO_BLK_ZT_SWR
const SEQUENTIAL: u8 = 2;

impl Disk {
    /// The status of a request that the device has refused for the sake of a zone.
    #[cold]
    pub(in crate::engine) fn zone_status(&self, fault: ZoneFault) -> Status {
        match fault {
            // The guest knows of no zones.
            _ if self.zones.is_none() => Status::IoError,
            ZoneFault::Invalid => Status::ZoneInvalidCommand,
            ZoneFault::WritePointer => Status::ZoneUnalignedWritePointer,
            ZoneFault::TooManyOpen => Status::ZoneOpenResource,
            ZoneFault::TooManyActive => Status::ZoneActiveResource,
        }
    }
}

/// Why a write is not passed to the device; `None` if it is.
pub(super) fn write_fault(disk: &Disk, sector: u64, bytes: u64) -> Option<Status> {
    let zones = disk.zones?;
    match disk.block(sector, bytes) {
        Err(RequestFault::Alignment { .. }) => Some(Status::ZoneUnalignedWritePointer),
        // A device that got the part before the boundary would write it.
        Ok(block) if !zones.in_one(block, bytes >> disk.block_shift()) => Some(Status::ZoneInvalidCommand),
        _ => None,
    }
}

/// Parses a request of any type that is not known elsewhere.
#[cold]
pub(super) fn job(
    (kind, sector): (u32, u64),
    chain: &Chain,
    guest: &mut GuestMemoryView,
    disk: &Disk,
    data: &mut Data,
) -> Result<Job, RequestFault> {
    let Some(zones) = disk.zones else { return Ok(Job::Answer(Status::Unsupported)) };
    let action = match kind {
        T_REPORT => return report(sector, zones, chain, guest, disk, data),
        T_APPEND => return append(sector, zones, chain, guest, disk, data),
        T_OPEN => ZoneAction::Open,
        T_CLOSE => ZoneAction::Close,
        T_FINISH => ZoneAction::Finish,
        T_RESET => ZoneAction::Reset,
        T_RESET_ALL => ZoneAction::ResetAll,
        _ => return Ok(Job::Answer(Status::Unsupported)),
    };
    if total(chain.readable()) != HEADER || total(chain.writable()) != 1 {
        return Err(RequestFault::Direction);
    }
    if disk.is_read_only() {
        return Err(RequestFault::ReadOnly);
    }
    let sector = if action == ZoneAction::ResetAll { 0 } else { sector };
    Ok(match zone_at(sector, zones, disk) {
        Some(block) => Job::Device { operation: Operation::ManageZone(action), block, bytes: 0 },
        None => Job::Answer(Status::ZoneInvalidCommand),
    })
}

/// The first block of the zone that starts at `sector`.
fn zone_at(sector: u64, zones: DiskZones, disk: &Disk) -> Option<u64> {
    let block = disk.block(sector, disk.block_size().into()).ok()?;
    (zones.start(block) == block).then_some(block)
}

fn report(
    sector: u64,
    zones: DiskZones,
    chain: &Chain,
    guest: &mut GuestMemoryView,
    disk: &Disk,
    data: &mut Data,
) -> Result<Job, RequestFault> {
    if total(chain.readable()) != HEADER {
        return Err(RequestFault::Direction);
    }
    let room = collect_writable(chain, guest, &mut data.buffers)?;
    let sector = sector & !u64::from((disk.block_size() >> SECTOR_SHIFT) - 1);
    let (Ok(block), true) = (disk.block(sector, disk.block_size().into()), room >= REPORT_HEADER + REPORT_ZONE) else {
        return Ok(Job::Answer(Status::ZoneInvalidCommand));
    };
    let room = room.min(zones.max_report.into());
    let bytes = room - (room - REPORT_HEADER) % REPORT_ZONE;
    Ok(Job::Device { operation: Operation::ZoneReport, block: zones.start(block), bytes })
}

fn append(
    sector: u64,
    zones: DiskZones,
    chain: &Chain,
    guest: &mut GuestMemoryView,
    disk: &Disk,
    data: &mut Data,
) -> Result<Job, RequestFault> {
    if !APPEND_REPLY.contains(&total(chain.writable())) {
        return Err(RequestFault::Direction);
    }
    if disk.is_read_only() {
        return Err(RequestFault::ReadOnly);
    }
    collect_writable(chain, guest, &mut data.append_sector)?;
    let bytes = collect_readable(chain, guest, &mut data.buffers)?;
    let fault = match disk.block(sector, bytes) {
        Err(RequestFault::Alignment { .. }) => Status::ZoneUnalignedWritePointer,
        Err(fault) => return Err(fault),
        Ok(block) if zones.start(block) == block && (1..=u64::from(zones.max_append)).contains(&bytes) => {
            return Ok(Job::Device { operation: Operation::ZoneAppend, block, bytes });
        }
        Ok(_) => Status::ZoneInvalidCommand,
    };
    Ok(Job::Answer(fault))
}

/// What the device writes before the status of an append: the first sector of its `bytes` bytes, which were placed at `block`.
/// `None` if that is not in the zone that starts at `zone`.
pub(in crate::engine) fn append_reply(disk: &Disk, zone: u64, block: u64, bytes: u64) -> Option<[u8; 15]> {
    let zones = disk.zones?;
    let end = block.checked_sub(zone)?.checked_add(bytes >> disk.block_shift())?;
    let sector = block << (disk.block_shift() - SECTOR_SHIFT);
    let mut reply = [0; 2 * APPEND_SECTOR - 1];
    reply[..APPEND_SECTOR].copy_from_slice(&sector.to_le_bytes());
    (end <= zones.blocks).then_some(reply)
}

/// Bytes of a report of one zone.
pub(in crate::engine) const ONE_ZONE: u32 = 128;

/// The write pointer of the first zone in a report, if it has one.
pub(in crate::engine) fn write_pointer(report: &[u8]) -> Option<u64> {
    zones(report).next().filter(|zone| zone.state.is_writable()).map(|zone| zone.write_pointer)
}

/// The reply to a report, from what the device has transferred.
pub(in crate::engine) fn reply(disk: &Disk, report: &[u8]) -> Vec<u8> {
    let sectors = |blocks: u64| blocks << (disk.block_shift() - SECTOR_SHIFT);
    let mut reply = vec![0; size_of::<ReportHeader>()];
    let mut nr_zones = 0;
    for Zone { start, capacity, write_pointer, state } in zones(report) {
        // Where it has no meaning, some controllers report all ones, which would not fit.
        let pointer = if state.is_writable() { write_pointer } else { start.saturating_add(capacity) };
        let descriptor = Descriptor {
            z_cap: sectors(capacity),
            z_start: sectors(start),
            z_wp: sectors(pointer),
            z_type: SEQUENTIAL,
            z_state: state as u8,
            reserved: [0; 38],
        };
        reply.extend(descriptor.as_bytes());
        nr_zones += 1;
    }
    let header = ReportHeader { nr_zones, reserved: [0; 56] };
    reply[..size_of::<ReportHeader>()].copy_from_slice(header.as_bytes());
    reply
}
