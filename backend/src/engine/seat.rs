//! Where a worker and its virtqueues have their places.

use super::ring::Ring;

/// A virtqueue's place with its worker.
#[derive(Default)]
pub(super) struct Seat {
    /// SET_VRING_ENABLE; outlives the ring.
    pub(super) enabled: bool,
    pub(super) ring: Option<Ring>,
}

/// Which worker of how many, with how many rings.
pub(super) struct Post {
    pub(super) worker: usize,
    pub(super) workers: usize,
    pub(super) seats: usize,
}
