//! Physical Region Pages, which describe a command's data buffer (NVMe 2.0 §4.1.1).
//!
//! ```text
//! PRP1  first piece, may start inside a page
//! PRP2  unused | second and last page | PRP list of the other pages, whose last entry may point to the next list
//! ```

use crate::addr::{Iova, Span};

use super::dma::Dma;
use super::mapping::DmaFault;
use super::wire::{Entry, Status};

impl From<DmaFault> for Status {
    fn from(_: DmaFault) -> Self {
        Self::DATA_TRANSFER_ERROR
    }
}

/// The data pointer of one command.
pub(super) struct Prps {
    prp1: u64,
    prp2: u64,
    len: u64,
    page: u64,
}

impl Prps {
    /// The buffer of `len` bytes that `entry` describes, in pages of `page` bytes (CC.MPS).
    pub(super) fn new(entry: &Entry, len: u64, page: u64) -> Self {
        Self { prp1: entry.prp1(), prp2: entry.prp2(), len, page }
    }

    /// Calls `part` for each piece of the buffer in order.
    #[inline]
    pub(super) fn walk(
        &self,
        dma: &Dma<'_>,
        hint: &mut usize,
        mut part: impl FnMut(Span<Iova>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        let mask = self.page - 1;
        let span = |at, len| Span::new(Iova(at), len).ok_or(Status::DATA_TRANSFER_ERROR);
        if self.prp1 & 0b11 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let first = self.len.min(self.page - (self.prp1 & mask));
        part(span(self.prp1, first)?)?;
        let mut rest = self.len - first;
        if rest == 0 {
            return Ok(());
        }
        if rest <= self.page {
            return if self.prp2 & mask == 0 { part(span(self.prp2, rest)?) } else { Err(Status::PRP_OFFSET_INVALID) };
        }
        let mut list = self.prp2;
        if list & 0b111 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        while rest != 0 {
            let mut entry = [0; 8];
            dma.read(Iova(list), &mut entry, hint)?;
            let entry = u64::from_le_bytes(entry);
            if entry & mask != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            let last_of_page = list & mask == self.page - 8;
            if last_of_page && rest > self.page {
                list = entry;
                continue;
            }
            let len = rest.min(self.page);
            part(span(entry, len)?)?;
            rest -= len;
            list = list.wrapping_add(8);
        }
        Ok(())
    }
}
