//! Parameters of the engine and of a vring.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::inflight_region::InflightRegion;
use super::recovery::WatchdogOptions;
use super::virtqueue::layout::Layout;
use crate::addr::{Gpa, Span};
use crate::placement::Placement;

/// Parameters of a ring (virtio 1.2 §2.7, §2.8).
pub struct VringSetup {
    /// Index of the virtqueue.
    pub index: usize,
    /// Packed if VIRTIO_F_RING_PACKED was acked.
    pub layout: Layout,
    /// Number of descriptors; see [`Layout::allows`].
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: Span<Gpa>,
    /// Available ring, or the driver's event suppression structure.
    pub avail: Span<Gpa>,
    /// Used ring, or the device's event suppression structure. A split ring continues from the used index in memory.
    pub used: Span<Gpa>,
    /// Start position (SET_VRING_BASE). Split: the next avail index. Packed: the next available and the next used
    /// descriptor, 15 bits each, with the wrap counter as the top bit (vhost-user: "Vring descriptor indices for packed
    /// virtqueues").
    pub base: u32,
    /// What the first byte of `used` is logged as, if writes to it are logged while there is a log (VHOST_VRING_F_LOG).
    pub used_log: Option<Gpa>,
    /// VIRTIO_RING_F_EVENT_IDX acked.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC acked.
    pub indirect: bool,
    /// Signalled by the driver. Without it the ring is polled.
    pub kick: Option<OwnedFd>,
    /// Signalled to the driver.
    pub call: Option<OwnedFd>,
    /// Signalled when the ring fails.
    pub err: Option<OwnedFd>,
    /// Where the ring's requests in flight are recorded, and have been by the process that served it before.
    pub inflight: Option<InflightRegion>,
}

/// Options of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of virtqueues offered.
    pub rings: usize,
    /// How long a worker polls at most without finding work before it sleeps.
    pub spin: Duration,
    /// Time that commands in flight have to complete when a ring stops or memory is removed. After that the device is reset.
    pub drain_timeout: Duration,
    /// Command time-out and retry interval.
    pub watch: WatchdogOptions,
    /// On which CPUs the workers run.
    pub placement: Placement,
}
