//! Which virtqueues a worker serves.

use crate::engine::vring::Vring;

/// One virtqueue of a worker.
#[derive(Default)]
pub(in crate::engine) struct VringSlot {
    /// SET_VRING_ENABLE; it outlives the ring.
    pub(in crate::engine) enabled: bool,
    /// The started ring, if there is one.
    pub(in crate::engine) ring: Option<Vring>,
}

/// Worker `worker` of `workers`, and how many virtqueues it serves.
pub(in crate::engine) struct WorkerLayout {
    pub(in crate::engine) worker: usize,
    pub(in crate::engine) workers: usize,
    pub(in crate::engine) slots: usize,
}
