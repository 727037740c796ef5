//! Parses a chain into a request of the block device (virtio 1.2 §5.2.6): a 16-byte header, data, a status byte. Descriptor
//! boundaries carry no meaning (§2.7.4.1): the header is the first 16 readable bytes, the status is the last writable byte,
//! and the rest is data.
//!
//! All checks of what the guest requests are here, and each is done once. The results refer to existing guest memory and
//! existing blocks only. Each chain comes with a [`PendingUsed`], which must be completed with a used entry.

mod buffers;
mod disk_bounds;
mod disk_zones;
pub mod pending_used;
mod ranges;
mod transfer;
mod types;
pub(in crate::engine) mod zones;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use disk_bounds::DiskBounds;
pub use disk_zones::max_append;
pub use transfer::Transfer;
pub use types::{BOUNCE_BYTES, Data, Disk, ID_BYTES, Job, Operation, RangeLimits, RequestFault, Status};

use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::virtqueue::chain::Chain;
use buffers::{collect_readable, collect_writable, total};
use pending_used::PendingUsed;
use ranges::Kind;
pub(super) use ranges::{batch, next};
use types::{HEADER, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};

/// `struct virtio_blk_req` up to the data.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// Parses a chain. `data` receives the request's buffers and ranges.
#[inline]
pub fn parse(chain: &Chain, guest: &mut GuestMemoryView, disk: &Disk, data: &mut Data) -> (PendingUsed, Job) {
    data.clear();
    let status = chain.last_writable().filter(|&byte| guest.has_status(byte));
    let pending_used = PendingUsed::new(chain.head(), status);
    if let Some(fault) = chain.fault() {
        return (pending_used, Job::Refuse(fault.into()));
    }
    if status.is_none() {
        return (pending_used, Job::Refuse(RequestFault::NoStatus));
    }
    let job = job(chain, guest, disk, data).unwrap_or_else(Job::Refuse);
    (pending_used, job)
}

#[inline]
fn job(chain: &Chain, guest: &mut GuestMemoryView, disk: &Disk, data: &mut Data) -> Result<Job, RequestFault> {
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
            if disk.is_read_only() {
                return Err(RequestFault::ReadOnly);
            }
            let bytes = collect_readable(chain, guest, buffers)?;
            if let Some(fault) = zones::write_fault(disk, header.sector, bytes) {
                return Ok(Job::Answer(fault));
            }
            transfer(Operation::Write, disk.block(header.sector, bytes)?, bytes)
        }
        T_DISCARD => range_job(Kind::Discard, chain, guest, disk, data),
        T_WRITE_ZEROES => range_job(Kind::WriteZeroes, chain, guest, disk, data),
        T_FLUSH if disk.cache_on() => Ok(Job::Device { operation: Operation::Flush, block: 0, bytes: 0 }),
        T_FLUSH => Ok(Job::Answer(Status::Ok)),
        T_GET_ID => {
            collect_writable(chain, guest, buffers)?;
            Ok(Job::Identify)
        }
        kind => zones::job((kind, header.sector), chain, guest, disk, data),
    }
}

#[cold]
fn range_job(
    kind: Kind,
    chain: &Chain,
    guest: &mut GuestMemoryView,
    disk: &Disk,
    data: &mut Data,
) -> Result<Job, RequestFault> {
    if total(chain.writable()) != 1 {
        return Err(RequestFault::Direction);
    }
    if disk.is_read_only() {
        return Err(RequestFault::ReadOnly);
    }
    let bytes = collect_readable(chain, guest, &mut data.buffers)?;
    ranges::job(kind, bytes, guest, disk, data)
}

/// A transfer of zero bytes succeeds at once, because NVMe has no command for it.
#[inline]
fn transfer(operation: Operation, block: u64, bytes: u64) -> Result<Job, RequestFault> {
    Ok(if bytes == 0 { Job::Answer(Status::Ok) } else { Job::Device { operation, block, bytes } })
}
