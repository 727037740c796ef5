//! I/O commands (NVM Command Set 1.0 §3.2). Each is executed synchronously by the thread that fetched it.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use crate::addr::{Iova, Span};

use super::controller::Controller;
use super::dma::Dma;
use super::mapping::Access;
use super::namespaces::{Extent, Namespace};
use super::prp::Prps;
use super::queue::{Hints, Sq};
use super::sgl::Sgl;
use super::traffic::Traffic;
use super::traits::{Support, Traits};
use super::wire::{Entry, Status, nvm};

/// All namespaces (NVMe 2.0 §3.2.1.2).
pub(super) const BROADCAST: u32 = u32::MAX;
/// Force Unit Access, in command dword 12.
const FUA: u32 = 1 << 30;
/// Deallocate, in command dword 12 of Write Zeroes.
const DEALLOCATE: u32 = 1 << 25;

impl Controller {
    /// Executes one I/O command. Also returns dwords 0 and 1 of its completion.
    #[inline]
    pub(super) fn execute_io(&self, sq: &mut Sq, entry: &Entry, dma: &Dma<'_>, traffic: &mut Traffic) -> (Status, u64) {
        let mut answer = 0;
        let result = self.check_path().and_then(|()| match entry.opcode() {
            _ if entry.fuse() != 0 || !self.supports_psdt(entry) => Err(Status::INVALID_FIELD),
            nvm::READ => self.read(entry, &mut sq.hints, dma).map(|bytes| {
                traffic.reads += 1;
                traffic.bytes_read += bytes;
            }),
            nvm::WRITE => self.write(entry, &mut sq.hints, dma).map(|bytes| {
                traffic.writes += 1;
                traffic.bytes_written += bytes;
            }),
            nvm::FLUSH => self.flush(entry).map(|()| traffic.flushes += 1),
            _ if self.zones.is_some() => self.zoned(entry, &mut sq.hints, dma).map(|block| {
                traffic.others += 1;
                answer = block;
            }),
            nvm::WRITE_ZEROES if self.options.traits.write_zeroes != Support::Yes => Err(Status::INVALID_OPCODE),
            nvm::DATASET_MANAGEMENT if self.options.traits.deallocate != Support::Yes => Err(Status::INVALID_OPCODE),
            nvm::WRITE_ZEROES => self.write_zeroes(entry).map(|()| traffic.others += 1),
            nvm::DATASET_MANAGEMENT => self.deallocate(entry, &mut sq.hints, dma).map(|()| traffic.others += 1),
            _ => Err(Status::INVALID_OPCODE),
        });
        match result {
            Ok(()) => (Status::SUCCESS, answer),
            Err(status) => {
                traffic.errors += 1;
                (status, 0)
            }
        }
    }

    /// True if the controller supports the command's PSDT. 11b is reserved.
    fn supports_psdt(&self, entry: &Entry) -> bool {
        match entry.psdt() {
            0 => true,
            1 | 2 => self.options.sgl,
            _ => false,
        }
    }

    /// Calls `part` for each piece of the `len` bytes that the command's data pointer describes.
    #[inline]
    pub(super) fn walk(
        &self,
        entry: &Entry,
        len: u64,
        dma: &Dma<'_>,
        hint: &mut usize,
        part: impl FnMut(Span<Iova>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        if entry.psdt() == 0 {
            Prps::new(entry, len, self.page.load(Relaxed).into()).walk(dma, hint, part)
        } else {
            Sgl::new(entry, len).walk(dma, hint, part)
        }
    }

    /// The block range in dwords 10 to 12, checked against the namespace.
    fn extent(&self, entry: &Entry) -> Result<Extent, Status> {
        let count = u64::from(entry.cdw(12) & 0xffff) + 1;
        self.blocks(entry, entry.u64(40), count)
    }

    /// Blocks of the namespace of `entry`.
    pub(super) fn blocks(&self, entry: &Entry, first: u64, count: u64) -> Result<Extent, Status> {
        self.namespace(entry)?.extent(first, count, self.options.lba)
    }

    /// The blocks of a transfer.
    #[inline]
    fn transfer_extent(&self, entry: &Entry, dma: &Dma<'_>) -> Result<Extent, Status> {
        let extent = self.extent(entry)?;
        let Traits { io_boundary, metadata, .. } = self.options.traits;
        if io_boundary != 0 || metadata != 0 {
            self.check_transfer(entry, dma)?;
        }
        Ok(extent)
    }

    /// Transfers the metadata, and fails a command that crosses a multiple of NOIOB: a real controller would only be slow.
    #[cold]
    fn check_transfer(&self, entry: &Entry, dma: &Dma<'_>) -> Result<(), Status> {
        let Traits { io_boundary, metadata, .. } = self.options.traits;
        let (first, last) = (entry.u64(40), entry.u64(40) + u64::from(entry.cdw(12) & 0xffff));
        if io_boundary != 0 && first / u64::from(io_boundary) != last / u64::from(io_boundary) {
            return Err(Status::INVALID_FIELD);
        }
        if metadata == 0 { Ok(()) } else { self.metadata(entry, last - first + 1, dma) }
    }

    /// Transfers the metadata of `blocks` blocks to or from the buffer at the command's metadata pointer.
    fn metadata(&self, entry: &Entry, blocks: u64, dma: &Dma<'_>) -> Result<(), Status> {
        let len = usize::try_from(blocks * u64::from(self.options.traits.metadata)).expect("at most 8 MiB");
        let (at, mut hint) = (Iova(entry.u64(16)), 0);
        if !at.0.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD);
        }
        let mut bytes = vec![0xff; len];
        if entry.opcode() == nvm::READ {
            dma.write(at, &bytes, &mut hint)?;
            return Ok(());
        }
        dma.read(at, &mut bytes, &mut hint)?;
        if bytes.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(Status::WRITE_FAULT) }
    }

    pub(super) fn namespace(&self, entry: &Entry) -> Result<&Namespace, Status> {
        self.namespaces.get(entry.nsid()).ok_or(Status::INVALID_NAMESPACE)
    }

    /// Checks `len` against MDTS (NVMe 2.0 §5.17.2.1, byte 77), whose unit is CAP.MPSMIN, 4096 bytes.
    pub(super) fn check_size(&self, len: u64) -> Result<(), Status> {
        let fits = self.options.mdts == 0 || len <= 4096 << self.options.mdts;
        if fits { Ok(()) } else { Err(Status::INVALID_FIELD) }
    }

    fn read(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<u64, Status> {
        let Extent { mut offset, len } = self.transfer_extent(entry, dma)?;
        self.check_size(len)?;
        if let Some(zones) = &self.zones {
            zones.lock().admit_read(entry.u64(40), self.to_blocks(len))?;
        }
        let Hints { list, data } = hints;
        self.walk(entry, len, dma, list, |span| {
            dma.each(Access::Write, span, data, |shared, at, len| {
                self.store.read(offset, shared, at, len).map_err(|error| failed("read", &error, Status::READ_ERROR))?;
                offset += len as u64;
                Ok(())
            })
        })?;
        Ok(len)
    }

    fn write(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<u64, Status> {
        let extent = self.transfer_extent(entry, dma)?;
        self.check_size(extent.len)?;
        let Some(zones) = &self.zones else { return self.store(entry, extent, hints, dma) };
        let (block, count) = (entry.u64(40), self.to_blocks(extent.len));
        let mut zones = zones.lock();
        zones.admit_write(block, count)?;
        let len = self.store(entry, extent, hints, dma)?;
        zones.written(block, count);
        Ok(len)
    }

    pub(super) fn to_blocks(&self, len: u64) -> u64 {
        len / u64::from(self.options.lba)
    }

    /// Stores the command's data.
    pub(super) fn store(
        &self,
        entry: &Entry,
        Extent { mut offset, len }: Extent,
        hints: &mut Hints,
        dma: &Dma<'_>,
    ) -> Result<u64, Status> {
        let Hints { list, data } = hints;
        self.walk(entry, len, dma, list, |span| {
            dma.each(Access::Read, span, data, |shared, at, len| {
                self.store
                    .write(offset, shared, at, len)
                    .map_err(|error| failed("write", &error, write_status(&error)))?;
                offset += len as u64;
                Ok(())
            })
        })?;
        self.make_durable(entry)?;
        Ok(len)
    }

    /// Flushes the medium after a write, unless the write cache is on and the command has no FUA.
    fn make_durable(&self, entry: &Entry) -> Result<(), Status> {
        if self.write_cache.load(Relaxed) && entry.cdw(12) & FUA == 0 {
            return Ok(());
        }
        self.store.flush().map_err(|error| failed("flush", &error, Status::WRITE_FAULT))
    }

    fn flush(&self, entry: &Entry) -> Result<(), Status> {
        if entry.nsid() != BROADCAST {
            self.namespace(entry)?;
        }
        self.store.flush().map_err(|error| failed("flush", &error, Status::WRITE_FAULT))
    }

    /// NVM Command Set 1.0 §3.2.8.
    fn write_zeroes(&self, entry: &Entry) -> Result<(), Status> {
        let Extent { offset, len } = self.extent(entry)?;
        let limit = self.options.traits.zeroes_limit;
        if limit != 0 && len > 4096 << limit {
            return Err(Status::INVALID_FIELD);
        }
        let release = entry.cdw(12) & DEALLOCATE != 0;
        self.store.zero(offset, len, release).map_err(|error| failed("zero", &error, write_status(&error)))?;
        self.make_durable(entry)
    }

    /// Dataset Management; deallocated blocks read as zero (NVM Command Set 1.0 §3.2.3).
    fn deallocate(&self, entry: &Entry, hints: &mut Hints, dma: &Dma<'_>) -> Result<(), Status> {
        const RANGE_BYTES: usize = 16;
        let namespace = self.namespace(entry)?;
        let count = (usize::from(entry.cdw(10).to_le_bytes()[0]) + 1) * RANGE_BYTES;
        let wanted = entry.cdw(11) & 0b100 != 0;
        let mut ranges = [0; 256 * RANGE_BYTES];
        let ranges = &mut ranges[..count];
        let mut done = 0;
        let Hints { list, data } = hints;
        self.walk(entry, count as u64, dma, list, |span| {
            let len = usize::try_from(span.len()).expect("at most 4096 bytes");
            dma.read(span.start(), &mut ranges[done..done + len], data)?;
            done += len;
            Ok(())
        })?;
        self.check_ranges(ranges)?;
        for range in ranges.chunks_exact(RANGE_BYTES) {
            let count = u32::from_le_bytes(range[4..8].try_into().expect("four bytes"));
            let first = u64::from_le_bytes(range[8..16].try_into().expect("eight bytes"));
            let extent = namespace.extent(first, count.into(), self.options.lba)?;
            if wanted && count != 0 {
                self.store
                    .zero(extent.offset, extent.len, true)
                    .map_err(|error| failed("deallocate", &error, write_status(&error)))?;
            }
        }
        Ok(())
    }
}

impl Controller {
    /// Checks the ranges of a Dataset Management command against DMRL, DMRSL and DMSL.
    fn check_ranges(&self, ranges: &[u8]) -> Result<(), Status> {
        let Traits { discard_ranges, discard_range_blocks, discard_blocks, .. } = self.options.traits;
        let limit = |limit: u64| if limit == 0 { u64::MAX } else { limit };
        let counts = ranges.chunks_exact(16).map(|range| range[4..8].try_into().expect("four bytes"));
        let counts: Vec<u64> = counts.map(|count| u32::from_le_bytes(count).into()).collect();
        let fits = counts.len() as u64 <= limit(discard_ranges.into())
            && counts.iter().all(|count| *count <= limit(discard_range_blocks.into()))
            && counts.iter().sum::<u64>() <= limit(discard_blocks);
        if fits { Ok(()) } else { Err(Status::INVALID_FIELD) }
    }
}

fn write_status(error: &io::Error) -> Status {
    if error.kind() == io::ErrorKind::StorageFull { Status::CAPACITY_EXCEEDED } else { Status::WRITE_FAULT }
}

#[cold]
fn failed(operation: &str, error: &io::Error, status: Status) -> Status {
    log::error!("emulated function: {operation} of the medium: {error}");
    status
}
