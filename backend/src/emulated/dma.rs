//! DMA of the function: transfers to and from mapped memory only.

use std::sync::{Mutex, RwLockReadGuard};

use crate::addr::{Iova, Span};
use crate::sys::SharedMemory;

use super::cache::Cache;
use super::lock;
use super::mapping::{Access, DmaFault, FaultLog, Mapping};

/// The function's access to memory. While this exists, mappings do not change.
pub(super) struct Dma<'a> {
    pub(super) mappings: RwLockReadGuard<'a, Vec<Mapping>>,
    pub(super) faults: &'a Mutex<FaultLog>,
    /// The cache model that these transfers bypass, if the function sets No Snoop.
    pub(super) cache: Option<&'a Cache>,
    pub(super) detached: bool,
}

impl Dma<'_> {
    /// Fast path: the memory of `span`, if one writable mapping contains all of it and there is no cache to bypass.
    #[inline]
    pub(super) fn shared(&self, span: Span<Iova>, hint: usize) -> Option<(&SharedMemory, usize)> {
        if self.cache.is_some() || self.detached {
            return None;
        }
        let mapping = self.mappings.get(hint).filter(|mapping| mapping.writable)?;
        mapping.span.offset_of_span(&span).map(|offset| (&mapping.shared, size(offset)))
    }

    /// Splits `span` by mapping and calls `part` for each piece in order. `hint` is the index of the last mapping used. The
    /// first unmapped byte is recorded as a fault and ends the walk.
    #[inline]
    pub(super) fn each<E: From<DmaFault>>(
        &self,
        access: Access,
        span: Span<Iova>,
        hint: &mut usize,
        mut part: impl FnMut(&SharedMemory, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some((shared, offset)) = self.shared(span, *hint) {
            return part(shared, offset, size(span.len()));
        }
        self.each_piece(access, span, hint, &mut part)
    }

    /// [`Self::each`] without the fast path.
    #[cold]
    fn each_piece<E: From<DmaFault>>(
        &self,
        access: Access,
        span: Span<Iova>,
        hint: &mut usize,
        part: &mut dyn FnMut(&SharedMemory, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = span;
        loop {
            let found = self.find(rest.start(), hint);
            let Some(mapping) = found.filter(|mapping| mapping.writable || access == Access::Read) else {
                return Err(self.fault(rest.start(), access).into());
            };
            let offset = mapping.span.offset_of(rest.start()).expect("found by address");
            let len = rest.len().min(mapping.span.len() - offset);
            match self.cache {
                None => part(&mapping.shared, size(offset), size(len))?,
                Some(cache) => cache.transfer(access, &mapping.shared, (size(offset), size(len)), &mut *part)?,
            }
            match rest.slice(len, rest.len() - len) {
                Some(next) => rest = next,
                None => return Ok(()),
            }
        }
    }

    /// Reads `bytes.len()` bytes at `at`.
    #[inline]
    pub(super) fn read(&self, at: Iova, bytes: &mut [u8], hint: &mut usize) -> Result<(), DmaFault> {
        let span = Span::new(at, bytes.len() as u64).ok_or_else(|| self.fault(at, Access::Read))?;
        let mut done = 0;
        self.each(Access::Read, span, hint, |shared, offset, len| {
            shared.copy_to(offset, &mut bytes[done..done + len]);
            done += len;
            Ok(())
        })
    }

    /// Writes `bytes` at `at`.
    #[inline]
    pub(super) fn write(&self, at: Iova, bytes: &[u8], hint: &mut usize) -> Result<(), DmaFault> {
        let span = Span::new(at, bytes.len() as u64).ok_or_else(|| self.fault(at, Access::Write))?;
        let mut done = 0;
        self.each(Access::Write, span, hint, |shared, offset, len| {
            shared.copy_from(offset, &bytes[done..done + len]);
            done += len;
            Ok(())
        })
    }

    #[inline]
    fn find(&self, at: Iova, hint: &mut usize) -> Option<&Mapping> {
        if self.detached {
            return None;
        }
        if let Some(mapping) = self.mappings.get(*hint).filter(|mapping| mapping.span.contains(at)) {
            return Some(mapping);
        }
        let after = self.mappings.partition_point(|mapping| mapping.span.start() <= at);
        *hint = after.checked_sub(1)?;
        self.mappings.get(*hint).filter(|mapping| mapping.span.contains(at))
    }

    /// Records a DMA to an address that is not mapped.
    #[cold]
    pub(super) fn fault(&self, iova: Iova, access: Access) -> DmaFault {
        let fault = DmaFault { iova, access };
        lock(self.faults).add(fault);
        fault
    }
}

/// Converts a length or offset in a mapping, which fits the address space of this process.
#[inline]
fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("inside shared memory")
}
