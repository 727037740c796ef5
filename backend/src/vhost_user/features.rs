//! The features that are offered, and why. QEMU acknowledges every bit it knows, whether it uses it or not, so a bit is
//! offered only if everything that it implies is implemented.
//!
//! | virtio-blk | offered | because |
//! |---|---|---|
//! | `SEG_MAX` | always | 126 data buffers, header and status fill an indirect table of 128 |
//! | `RO` | the disk is read-only | tells the guest; the engine refuses writes in any case |
//! | `BLK_SIZE`, `TOPOLOGY` | always | the drive's block sizes |
//! | `FLUSH`, `CONFIG_WCE` | the drive has a volatile cache | without one, every completed write is durable |
//! | `MQ` | always | one virtqueue per vCPU, spread over the workers |
//! | `SIZE_MAX` | the drive's longest transfer is known | longer buffers are split, which gains nothing |
//! | `DISCARD`, `WRITE_ZEROES` | the drive has the command and is not read-only | the limits follow from the drive's |
//! | `ZONED` | the drive is zoned | its zones must be written in order; a front-end must acknowledge it |
//!
//! | ring | offered | because |
//! |---|---|---|
//! | `INDIRECT_DESC`, `EVENT_IDX` | always | the engine implements both |
//! | `RING_PACKED` | unless `--rings split` | the engine implements both layouts; some front-ends start packed rings wrongly |
//! | `VERSION_1` | always | the device is not a legacy device |
//! | `ACCESS_PLATFORM` | never | IOTLB messages are not implemented |
//! | `LOG_ALL` | always | each page that a request writes is marked when the request completes |
//!
//! | protocol | because |
//! |---|---|
//! | `MQ` | without it, a front-end uses a single virtqueue |
//! | `LOG_SHMFD` | where pages are marked; without it QEMU neither migrates nor saves the guest |
//! | `REPLY_ACK` | the only way to report that memory could not be mapped |
//! | `CONFIG` | QEMU's vhost-user-blk requires it |
//! | `INFLIGHT_SHMFD` | the requests in flight when this process ends are submitted again by the next |
//! | `CONFIGURE_MEM_SLOTS` | memory is added and removed one region at a time |
//! | `RESET_DEVICE`, `STATUS` | a reset by the guest stops the vrings |
//! | `BACKEND_REQ` | a new size of the disk is reported while the guest runs |
//! | `GET_VRING_BASE_INFLIGHT` | requests that a slow drive does not complete are left to their record; they need not fail |
//! | `GET_VRING_BASE_SKIP_DRAIN` | the same almost at once, if a message asks for it |
//! | `GPA_ADDRESSES` | the device uses guest-physical addresses; the front-end's own are not needed |
//!
//! QEMU would acknowledge bits 14 and 17 (`INBAND_NOTIFICATIONS`, `XEN_MMAP`) if they were offered, and they change the
//! meaning of other messages.

use std::fmt;

use bitflags::{Flags, bitflags};

use crate::driver::Geometry;
use crate::engine::Layout;
use crate::engine::request::RangeLimits;

/// `VIRTIO_F_ACCESS_PLATFORM`, never offered: descriptors would hold addresses that a virtual IOMMU translates.
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
        /// `VIRTIO_BLK_F_ZONED` (virtio 1.3 §5.2.3)
        const ZONED = 1 << 17;
        /// `VHOST_F_LOG_ALL`: pages that are written are marked in the log. A front-end acknowledges it while it migrates.
        const LOG_ALL = 1 << 26;
        /// `VIRTIO_F_RING_INDIRECT_DESC`
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_RING_EVENT_IDX`
        const EVENT_IDX = 1 << 29;
        /// `VHOST_USER_F_PROTOCOL_FEATURES`. Also means that vrings wait for `SET_VRING_ENABLE`.
        const PROTOCOL_FEATURES = 1 << 30;
        /// `VIRTIO_F_VERSION_1`
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_RING_PACKED`
        const RING_PACKED = 1 << 34;
    }
}

bitflags! {
    /// Feature bits of the protocol (vhost-user: "Protocol features").
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// Multiple queues.
        const MQ = 1;
        /// `SET_LOG_BASE` comes with a file.
        const LOG_SHMFD = 1 << 1;
        /// A message may request an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// A second socket, for messages of the back-end.
        const BACKEND_REQ = 1 << 5;
        /// `GET_CONFIG` and `SET_CONFIG`.
        const CONFIG = 1 << 9;
        /// `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`.
        const INFLIGHT_SHMFD = 1 << 12;
        /// `RESET_DEVICE`.
        const RESET_DEVICE = 1 << 13;
        /// `ADD_MEM_REG` and `REM_MEM_REG`.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// `SET_STATUS` and `GET_STATUS`.
        const STATUS = 1 << 16;
        /// A vring may stop with requests in flight, which are recorded. Needs `INFLIGHT_SHMFD`.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Addresses of vrings and regions are guest-physical.
        const GPA_ADDRESSES = 1 << 21;
        /// `GET_VRING_BASE_SKIP_DRAIN`. Needs `GET_VRING_BASE_INFLIGHT`.
        const GET_VRING_BASE_SKIP_DRAIN = 1 << 23;
    }
}

impl ProtocolFeatures {
    /// A feature among these that may be acknowledged only with another one, which is missing: both of them.
    pub(super) fn incomplete(self) -> Option<(Self, Self)> {
        let needs = [
            (Self::GET_VRING_BASE_INFLIGHT, Self::INFLIGHT_SHMFD),
            (Self::GET_VRING_BASE_SKIP_DRAIN, Self::GET_VRING_BASE_INFLIGHT),
        ];
        needs.into_iter().find(|(feature, needed)| self.contains(*feature) && !self.contains(*needed))
    }
}

impl VirtioFeatures {
    /// The features that a disk with this `geometry` offers.
    #[must_use]
    pub fn offered(geometry: &Geometry) -> Self {
        let mut offered = Self::all();
        offered.set(Self::SIZE_MAX, geometry.max_transfer != 0);
        offered.set(Self::RO, geometry.read_only);
        offered.set(Self::FLUSH | Self::CONFIG_WCE, geometry.volatile_cache);
        offered.set(Self::DISCARD, RangeLimits::discard(geometry).is_some());
        offered.set(Self::WRITE_ZEROES, RangeLimits::write_zeroes(geometry).is_some());
        offered.set(Self::ZONED, geometry.zones.is_some());
        offered
    }

    /// The virtqueue layout that these features select.
    #[must_use]
    pub fn layout(self) -> Layout {
        if self.contains(Self::RING_PACKED) { Layout::Packed } else { Layout::Split }
    }
}

/// Displays feature bits by name; a bit without a name is displayed as `bit 33`.
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
    fn a_read_only_disk_without_a_cache_offers_neither_flush_nor_discard() {
        let mut disk = geometry();
        (disk.read_only, disk.volatile_cache) = (true, false);

        let offered = VirtioFeatures::offered(&disk);

        assert!(offered.contains(VirtioFeatures::RO));
        let refused =
            VirtioFeatures::FLUSH | VirtioFeatures::CONFIG_WCE | VirtioFeatures::DISCARD | VirtioFeatures::WRITE_ZEROES;
        assert!(!offered.intersects(refused));
    }

    #[test]
    fn zones_are_offered_if_and_only_if_the_disk_has_them() {
        let disk = geometry();
        assert!(VirtioFeatures::offered(&disk).contains(VirtioFeatures::ZONED));
        assert!(!VirtioFeatures::offered(&Geometry { zones: None, ..disk }).contains(VirtioFeatures::ZONED));
    }

    #[test]
    fn only_implemented_bits_are_offered() {
        let offered = VirtioFeatures::offered(&geometry());
        // SIZE_MAX SEG_MAX BLK_SIZE FLUSH TOPOLOGY CONFIG_WCE MQ DISCARD WRITE_ZEROES, ZONED, LOG_ALL, INDIRECT EVENT_IDX
        // PROTOCOL_FEATURES, VERSION_1, PACKED.
        assert_eq!(offered.bits(), 0x7e46 | 1 << 17 | 1 << 26 | 7 << 28 | 1 << 32 | 1 << 34);
        assert_eq!(ProtocolFeatures::all().bits(), 0xb1_b22b);
        // The codec once had another feature at this bit (rust-vmm/vhost#367).
        assert_eq!(VhostUserProtocolFeatures::GPA_ADDRESSES.bits(), ProtocolFeatures::GPA_ADDRESSES.bits());
    }

    #[test]
    fn requests_can_be_left_only_to_a_record() {
        let (record, leave, skip) = (
            ProtocolFeatures::INFLIGHT_SHMFD,
            ProtocolFeatures::GET_VRING_BASE_INFLIGHT,
            ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN,
        );
        for complete in [ProtocolFeatures::empty(), record, record | leave, record | leave | skip] {
            assert_eq!(complete.incomplete(), None, "{complete:?}");
        }
        assert_eq!(leave.incomplete(), Some((leave, record)));
        assert_eq!((record | skip).incomplete(), Some((skip, leave)));
        assert!((leave | skip).incomplete().is_some());
    }

    #[test]
    fn names_show_unknown_bits_by_number() {
        let set = VirtioFeatures::from_bits_retain(1 << 33 | 1 << 5 | 1 << 12);
        assert_eq!(Names(set).to_string(), "RO MQ bit 33");
        assert_eq!(Names(ProtocolFeatures::empty()).to_string(), "none");
    }
}
