//! What the software IOMMU and the DMA through it have in common: mappings, directions and faults.

use std::collections::VecDeque;

use crate::addr::{Iova, Span};
use crate::sys::SharedMemory;

/// How many faults are kept; older ones are forgotten, though counted.
const FAULTS_KEPT: usize = 1024;

/// Direction of a DMA as the function sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The function reads memory.
    Read,
    /// The function writes memory.
    Write,
}

/// A DMA that met no mapping, or one that is read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaFault {
    /// The first address that is not mapped so.
    pub iova: Iova,
    /// What the function wanted there.
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
