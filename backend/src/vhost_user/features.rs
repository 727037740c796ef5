//! What is offered, and why. A front-end acknowledges every bit it knows whether or not it will use it (QEMU does), so a
//! bit stands here only if all of its consequences are implemented.
//!
//! | virtio-blk | offered | because |
//! |---|---|---|
//! | `SEG_MAX` | always | 126 buffers and two for header and status fill an indirect table of 128 |
//! | `RO` | read-only disk | the engine refuses writes whether or not the guest looked |
//! | `BLK_SIZE`, `TOPOLOGY` | always | the drive's own block sizes |
//! | `FLUSH`, `CONFIG_WCE` | volatile cache | without a cache that loses power, every completed write is durable already |
//! | `MQ` | always | one virtqueue per vCPU, spread over the workers |
//! | `SIZE_MAX` | the drive's longest transfer is known | longer buffers work and are cut, but nothing is gained by them |
//! | `DISCARD`, `WRITE_ZEROES` | the drive has the commands, and is not read-only | their limits follow from the drive's |
//!
//! | ring | offered | because |
//! |---|---|---|
//! | `INDIRECT_DESC`, `EVENT_IDX` | always | the engine does both |
//! | `RING_PACKED` | always | both layouts are served |
//! | `VERSION_1` | always | a modern device |
//! | `ACCESS_PLATFORM` | never | no IOTLB messages |
//! | `LOG_ALL` | never | the device's own writes to memory would escape the log |
//!
//! | protocol | because |
//! |---|---|
//! | `MQ` | else a front-end uses one virtqueue |
//! | `REPLY_ACK` | the only way to tell the front-end that memory could not be mapped |
//! | `CONFIG` | vhost-user-blk does not start without it |
//! | `CONFIGURE_MEM_SLOTS` | memory comes and goes one region at a time |
//! | `RESET_DEVICE`, `STATUS` | a guest's reset reaches the rings |
//! | `BACKEND_REQ` | the guest learns of a new size of the disk while it runs |
//! | `GPA_ADDRESSES` | guest addresses are what the device is given; the front-end's own need not be told |
//!
//! Bits 14 and 17 (`INBAND_NOTIFICATIONS`, `XEN_MMAP`) would be acknowledged by QEMU if they were offered, and change the
//! meaning of other messages.

use std::fmt;

use bitflags::{Flags, bitflags};

use crate::driver::Geometry;
use crate::engine::Layout;
use crate::engine::request::RangeLimits;

/// `VIRTIO_F_ACCESS_PLATFORM`, which is never offered: descriptors would hold addresses that a virtual IOMMU translates.
pub(super) const ACCESS_PLATFORM: u64 = 1 << 33;

bitflags! {
    /// Feature bits of the virtio device (virtio 1.2 §5.2.3, §6).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct VirtioFeatures: u64 {
        /// `VIRTIO_BLK_F_SIZE_MAX`
        const SIZE_MAX = 1 << 1;
        /// `VIRTIO_BLK_F_SEG_MAX`
        const SEG_MAX = 1 << 2;
        /// `VIRTIO_BLK_F_RO`
        const RO = 1 << 5;
        /// `VIRTIO_BLK_F_BLK_SIZE`
        const BLK_SIZE = 1 << 6;
        /// `VIRTIO_BLK_F_FLUSH`
        const FLUSH = 1 << 9;
        /// `VIRTIO_BLK_F_TOPOLOGY`
        const TOPOLOGY = 1 << 10;
        /// `VIRTIO_BLK_F_CONFIG_WCE`
        const CONFIG_WCE = 1 << 11;
        /// `VIRTIO_BLK_F_MQ`
        const MQ = 1 << 12;
        /// `VIRTIO_BLK_F_DISCARD`
        const DISCARD = 1 << 13;
        /// `VIRTIO_BLK_F_WRITE_ZEROES`
        const WRITE_ZEROES = 1 << 14;
        /// `VIRTIO_F_RING_INDIRECT_DESC`
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_RING_EVENT_IDX`
        const EVENT_IDX = 1 << 29;
        /// `VHOST_USER_F_PROTOCOL_FEATURES`; tells that rings wait for `SET_VRING_ENABLE`
        const PROTOCOL_FEATURES = 1 << 30;
        /// `VIRTIO_F_VERSION_1`
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_RING_PACKED`
        const RING_PACKED = 1 << 34;
    }
}

bitflags! {
    /// Feature bits of the conversation itself (vhost-user: "Protocol features").
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// Several queues.
        const MQ = 1;
        /// A request may ask for an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// A second socket, for messages that the back-end starts.
        const BACKEND_REQ = 1 << 5;
        /// Configuration space by message.
        const CONFIG = 1 << 9;
        /// The `RESET_DEVICE` message.
        const RESET_DEVICE = 1 << 13;
        /// Memory regions added and removed one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The device status by message.
        const STATUS = 1 << 16;
        /// Ring and region addresses are guest-physical ones.
        const GPA_ADDRESSES = 1 << 21;
    }
}

impl VirtioFeatures {
    /// What a disk of this `geometry` offers.
    #[must_use]
    pub fn offered(geometry: &Geometry) -> Self {
        let mut offered = Self::all();
        offered.set(Self::SIZE_MAX, geometry.max_transfer != 0);
        offered.set(Self::RO, geometry.read_only);
        offered.set(Self::FLUSH | Self::CONFIG_WCE, geometry.volatile_cache);
        offered.set(Self::DISCARD, RangeLimits::discard(geometry).is_some());
        offered.set(Self::WRITE_ZEROES, RangeLimits::write_zeroes(geometry).is_some());
        offered
    }

    /// How rings lie in memory under these features.
    #[must_use]
    pub fn layout(self) -> Layout {
        if self.contains(Self::RING_PACKED) { Layout::Packed } else { Layout::Split }
    }
}

/// Prints a set of feature bits by name; bits without a name as `bit 33`.
pub(super) struct Names<F>(pub(super) F);

impl<F: Flags<Bits = u64>> fmt::Display for Names<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut unnamed = self.0.bits();
        let mut separator = "";
        for (name, flag) in self.0.iter_names() {
            unnamed &= !flag.bits();
            write!(f, "{separator}{name}")?;
            separator = " ";
        }
        for bit in (0..64).filter(|bit| unnamed >> bit & 1 != 0) {
            write!(f, "{separator}bit {bit}")?;
            separator = " ";
        }
        if separator.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::VhostUserProtocolFeatures;

    use super::*;
    use crate::vhost_user::config::tests::geometry;

    #[test]
    fn a_read_only_disk_without_a_cache_says_so() {
        let mut disk = geometry();
        (disk.read_only, disk.volatile_cache) = (true, false);

        let offered = VirtioFeatures::offered(&disk);

        assert!(offered.contains(VirtioFeatures::RO));
        let refused =
            VirtioFeatures::FLUSH | VirtioFeatures::CONFIG_WCE | VirtioFeatures::DISCARD | VirtioFeatures::WRITE_ZEROES;
        assert!(!offered.intersects(refused));
    }

    #[test]
    fn only_implemented_bits_are_offered() {
        let offered = VirtioFeatures::offered(&geometry());
        // SIZE_MAX SEG_MAX BLK_SIZE FLUSH TOPOLOGY CONFIG_WCE MQ DISCARD WRITE_ZEROES, INDIRECT EVENT_IDX PROTOCOL_FEATURES,
        // VERSION_1, PACKED.
        assert_eq!(offered.bits(), 0x7e46 | 7 << 28 | 1 << 32 | 1 << 34);
        assert_eq!(ProtocolFeatures::all().bits(), 0x21_a229);
        // The codec gave this bit to another feature once (rust-vmm/vhost#367).
        assert_eq!(VhostUserProtocolFeatures::GPA_ADDRESSES.bits(), ProtocolFeatures::GPA_ADDRESSES.bits());
    }

    #[test]
    fn names_show_unknown_bits_by_number() {
        let set = VirtioFeatures::from_bits_retain(1 << 33 | 1 << 5 | 1 << 12);
        assert_eq!(Names(set).to_string(), "RO MQ bit 33");
        assert_eq!(Names(ProtocolFeatures::empty()).to_string(), "none");
    }
}
