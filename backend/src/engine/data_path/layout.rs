//! The virtqueues of a worker.

use crate::engine::vring::Vring;

/// One virtqueue of a worker. On cache lines of its own (two, because x86 fetches lines in pairs).
#[derive(Default)]
#[repr(align(128))]
pub(in crate::engine) struct VringSlot {
    /// SET_VRING_ENABLE. Survives a stop of the ring.
    pub(in crate::engine) enabled: bool,
    /// `None` while the ring is stopped.
    pub(in crate::engine) ring: Option<Vring>,
}

/// Worker `worker` of `workers`, and its number of virtqueues.
pub(in crate::engine) struct WorkerLayout {
    pub(in crate::engine) worker: usize,
    pub(in crate::engine) workers: usize,
    pub(in crate::engine) slots: usize,
}
