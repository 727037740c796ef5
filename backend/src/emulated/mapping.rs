//! Mappings and DMA faults: types shared by the software IOMMU and its DMA.

use std::collections::VecDeque;

use crate::addr::{Iova, Span};
use crate::sys::SharedMemory;

/// Number of faults kept. Older faults are dropped, but still counted.
const FAULTS_KEPT: usize = 1024;

/// Direction of a DMA as the function sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The function reads memory.
    Read,
    /// The function writes memory.
    Write,
}

/// A DMA to an unmapped address, or a write to a read-only mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaFault {
    /// The first address that faulted.
    pub iova: Iova,
    /// The kind of access.
    pub access: Access,
}

pub(super) struct Mapping {
    pub(super) span: Span<Iova>,
    pub(super) shared: SharedMemory,
    /// The function may write it.
    pub(super) writable: bool,
}

#[derive(Default)]
pub(super) struct FaultLog {
    pub(super) kept: VecDeque<DmaFault>,
    pub(super) total: u64,
}

impl FaultLog {
    pub(super) fn add(&mut self, fault: DmaFault) {
        self.total += 1;
        if self.kept.len() == FAULTS_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(fault);
    }
}
