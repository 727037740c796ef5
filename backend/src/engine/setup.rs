//! What the engine and a vring are started with.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::recovery::WatchdogOptions;
use super::virtqueue::layout::Layout;
use crate::addr::{Gpa, Span};

/// What a started ring is made of (virtio 1.2 §2.7, §2.8). All three areas have been found in the memory table.
pub struct VringSetup {
    /// Which virtqueue.
    pub index: usize,
    /// VIRTIO_F_RING_PACKED acked, or not.
    pub layout: Layout,
    /// Number of descriptors; see [`Layout::allows`].
    pub size: u16,
    /// Descriptor table or descriptor ring.
    pub desc: Span<Gpa>,
    /// Available ring, or the driver's event suppression structure.
    pub avail: Span<Gpa>,
    /// Used ring, or the device's event suppression structure. A split ring's used index goes on from what stands there.
    pub used: Span<Gpa>,
    /// Where to go on (SET_VRING_BASE). Split: first avail index to take. Packed: next available descriptor and next used
    /// one, 15 bits each with their wrap counters on top (vhost-user: "Vring descriptor indices for packed virtqueues").
    pub base: u32,
    /// VIRTIO_RING_F_EVENT_IDX acked.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC acked.
    pub indirect: bool,
    /// Signalled by the driver; without it the ring is polled.
    pub kick: Option<OwnedFd>,
    /// Signalled to the driver.
    pub call: Option<OwnedFd>,
    /// Signalled when the ring is broken.
    pub err: Option<OwnedFd>,
}

/// How the engine behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of virtqueues offered.
    pub rings: usize,
    /// How long a worker polls without finding work before it sleeps.
    pub spin: Duration,
    /// How long commands in flight may take to finish when a ring stops or memory goes away, before the device is reset.
    pub patience: Duration,
    /// How long the device is waited for.
    pub watch: WatchdogOptions,
}
