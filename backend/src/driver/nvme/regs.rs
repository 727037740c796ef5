//! Controller registers: offsets, and the fields that this driver uses. A register is read once into one of the types here
//! and then decoded, so decoding is pure and tested without a device.
//!
//! | name | offset | NVMe 2.0 § | | name | offset | NVMe 2.0 § |
//! |---|---|---|---|---|---|---|
//! | `CAP`  | 00h | 3.1.3.1 | | `AQA`  | 24h | 3.1.3.8 |
//! | `VS`   | 08h | 3.1.3.2 | | `ASQ`  | 28h | 3.1.3.9 |
//! | `CC`   | 14h | 3.1.3.5 | | `ACQ`  | 30h | 3.1.3.10 |
//! | `CSTS` | 1Ch | 3.1.3.6 | | `CRTO` | 68h | 3.1.3.21 |
//! | `INTMS` | 0Ch | 3.1.3.3 | | `CMBMSC` | 50h | 3.1.3.14 |
//!
//! Doorbells start at 1000h (NVMe over PCIe Transport 1.0 §3.1.2).

use std::fmt;
use std::time::Duration;

pub(super) const CAP: usize = 0x00;
pub(super) const VS: usize = 0x08;
pub(super) const INTMS: usize = 0x0c;
pub(super) const CC: usize = 0x14;
pub(super) const CSTS: usize = 0x1c;
pub(super) const AQA: usize = 0x24;
pub(super) const ASQ: usize = 0x28;
pub(super) const ACQ: usize = 0x30;
pub(super) const CMBMSC: usize = 0x50;
pub(super) const CRTO: usize = 0x68;
pub(super) const DOORBELLS: usize = 0x1000;

/// Memory page size of this driver (CC.MPS = 0), bytes. PRP entries and lists refer to such pages.
pub(super) const PAGE: u64 = 4096;
/// [`PAGE`] as a `usize`.
pub(super) const PAGE_LEN: usize = 4096;

/// Unit of CAP.TO and CRTO.
const TIMEOUT_UNIT: Duration = Duration::from_millis(500);

/// `CAP @ 00h`: controller capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities(pub(super) u64);

impl Capabilities {
    fn field(self, low: u32, bits: u32) -> u64 {
        (self.0 >> low) & ((1 << bits) - 1)
    }

    /// MQES: maximum queue size, entries (the field is 0's based).
    pub(super) fn max_queue_entries(self) -> u32 {
        u32::try_from(self.field(0, 16)).expect("16 bits") + 1
    }

    /// TO: how long RDY may take to follow EN. CRTO, read by `crto`, replaces it if it is longer.
    pub(super) fn ready_timeout(self, crto: impl FnOnce() -> u32) -> Duration {
        let to = u32::try_from(self.field(24, 8)).expect("8 bits");
        // CRMS bit 0 (CRWMS): CRTO.CRWMT is valid. NVMe 2.0 §3.1.3.21
        let crwmt = if self.field(59, 1) == 1 { crto() & 0xffff } else { 0 };
        TIMEOUT_UNIT * to.max(crwmt).max(1)
    }

    /// DSTRD: distance between two doorbells, bytes.
    pub(super) fn doorbell_stride(self) -> usize {
        4 << self.field(32, 4)
    }

    /// CSS bit 0: the NVM command set is supported.
    pub(super) fn nvm_command_set(self) -> bool {
        self.field(37, 1) == 1
    }

    /// CSS bit 6: namespaces may have other command sets, which each tells of itself.
    pub(super) fn several_command_sets(self) -> bool {
        self.field(43, 1) == 1
    }

    /// CSS bit 7: the controller can work without any I/O command set; only if no other bit is set it always does.
    pub(super) fn administrative(self) -> bool {
        self.field(37, 8) == 1 << 7
    }

    /// CMBS: there is a controller memory buffer, and CMBMSC.
    pub(super) fn memory_buffer(self) -> bool {
        self.field(57, 1) == 1
    }

    /// MPSMIN: minimum memory page size, bytes.
    pub(super) fn min_page(self) -> u64 {
        PAGE << self.field(48, 4)
    }

    /// A PCI read from an absent device returns all ones, which no controller has as its capabilities.
    pub(super) fn is_gone(self) -> bool {
        self.0 == u64::MAX
    }
}

/// `VS @ 08h`: the specification version of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [tertiary, minor, major_low, major_high] = self.0.to_le_bytes();
        write!(f, "{}.{minor}", u16::from_le_bytes([major_low, major_high]))?;
        if tertiary != 0 { write!(f, ".{tertiary}") } else { Ok(()) }
    }
}

/// `CC @ 14h`: EN.
pub(super) const CC_EN: u32 = 1;
/// `CC @ 14h`: CSS = 110b, all supported I/O command sets.
pub(super) const CC_CSS_ALL: u32 = 0b110 << 4;
/// `CC @ 14h`: CSS = 0 (NVM), MPS = 0 (4 KiB), AMS = 0 (round robin), submission entries of 2^6 and completion entries
/// of 2^4 bytes.
pub(super) const CC_SETTINGS: u32 = 6 << 16 | 4 << 20;
/// `CC @ 14h`: the SHN field.
pub(super) const CC_SHN_MASK: u32 = 3 << 14;
/// `CC @ 14h`: SHN = 01b, normal shutdown.
pub(super) const CC_SHN_NORMAL: u32 = 1 << 14;

/// `CSTS @ 1Ch`: controller status.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ControllerStatus(pub(super) u32);

impl ControllerStatus {
    /// RDY.
    pub(super) fn ready(self) -> bool {
        self.0 & 1 != 0
    }

    /// CFS: controller fatal status.
    pub(super) fn fatal(self) -> bool {
        self.0 & 2 != 0
    }

    /// SHST is not 00b: shutdown processing is in progress or complete.
    pub(super) fn shutting_down(self) -> bool {
        (self.0 >> 2) & 3 != 0
    }

    /// SHST = 10b: shutdown processing complete.
    pub(super) fn shutdown_complete(self) -> bool {
        (self.0 >> 2) & 3 == 2
    }

    /// See [`Capabilities::is_gone`].
    pub(super) fn is_gone(self) -> bool {
        self.0 == u32::MAX
    }
}

impl fmt::Debug for ControllerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CSTS {:#x} (RDY {}, CFS {}, SHST {})", self.0, self.0 & 1, (self.0 >> 1) & 1, (self.0 >> 2) & 3)
    }
}

/// `SQyTDBL`: tail doorbell of submission queue `queue`. PCIe Transport 1.0 §3.1.2.1
pub(super) fn submission_doorbell(queue: u16, stride: usize) -> usize {
    DOORBELLS + 2 * usize::from(queue) * stride
}

/// `CQyHDBL`: head doorbell of completion queue `queue`. PCIe Transport 1.0 §3.1.2.2
pub(super) fn completion_doorbell(queue: u16, stride: usize) -> usize {
    submission_doorbell(queue, stride) + stride
}

/// Size of the registers with the doorbells of queues 0 to `last`, bytes.
pub(super) fn registers_needed(last: u16, stride: usize) -> usize {
    completion_doorbell(last, stride) + 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_of_qemu_decode() {
        // QEMU's nvme device: MQES 7ff, CQR, TO 0f, DSTRD 0, CSS c1, MPSMIN 0, MPSMAX 4.
        let cap = Capabilities(0x0040_1820_0f01_07ff);

        assert_eq!(cap.max_queue_entries(), 2048);
        assert_eq!(cap.ready_timeout(|| unreachable!("CRMS is 0")), Duration::from_millis(7500));
        assert_eq!(cap.doorbell_stride(), 4);
        assert!(cap.nvm_command_set());
        assert_eq!(cap.min_page(), 4096);
        assert!(!cap.is_gone());
    }

    #[test]
    fn crto_replaces_a_saturated_timeout() {
        let cap = Capabilities(1 << 59 | 0xff << 24);
        assert_eq!(cap.ready_timeout(|| 0x7777_0200), Duration::from_secs(256));
        assert_eq!(cap.ready_timeout(|| 0x7777_0001), Duration::from_millis(127_500));
    }

    #[test]
    fn a_timeout_field_of_zero_still_allows_500_ms() {
        assert_eq!(Capabilities(0).ready_timeout(|| 0), Duration::from_millis(500));
    }

    #[test]
    fn the_largest_page_and_stride_do_not_overflow() {
        let cap = Capabilities(u64::MAX);
        assert_eq!(cap.min_page(), 4096 << 15);
        assert_eq!(cap.doorbell_stride(), 4 << 15);
        assert_eq!(cap.max_queue_entries(), 65536);
        assert!(registers_needed(u16::MAX, cap.doorbell_stride()) > 0x1000);
    }

    #[test]
    fn doorbells_interleave_by_stride() {
        assert_eq!(submission_doorbell(0, 4), 0x1000);
        assert_eq!(completion_doorbell(0, 4), 0x1004);
        assert_eq!(submission_doorbell(3, 16), 0x1000 + 6 * 16);
        assert_eq!(completion_doorbell(3, 16), 0x1000 + 7 * 16);
        assert_eq!(registers_needed(1, 4), 0x1010);
    }

    #[test]
    fn versions_print_as_in_the_specification() {
        assert_eq!(Version(0x0001_0400).to_string(), "1.4");
        assert_eq!(Version(0x0001_0201).to_string(), "1.2.1");
    }

    #[test]
    fn controller_status_fields_decode_independently() {
        let complete = ControllerStatus(0b1001);
        assert!(complete.ready() && complete.shutdown_complete() && !complete.fatal());
        let in_progress = ControllerStatus(0b0101);
        assert!(in_progress.shutting_down() && !in_progress.shutdown_complete());
        assert!(!ControllerStatus(0b0011).shutting_down());
        assert!(ControllerStatus(u32::MAX).is_gone());
    }
}
