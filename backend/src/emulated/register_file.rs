//! The writable controller registers, their fields, and the layout of BAR 0 (NVMe 2.0 §3.1.3).

/// CAP.TO: how long a host waits for CSTS.RDY, in units of 500 ms.
pub(super) const TIMEOUT: u64 = 2;
/// CAP.MPSMAX: the largest page is `4096 << MPSMAX` bytes.
pub(super) const MPSMAX: u32 = 4;
/// Version 1.4, the newest whose mandatory features are all implemented (2.0 adds log pages and CRTO).
pub(super) const VERSION: u32 = 0x0001_0400;

pub(super) const CC_ENABLE: u32 = 1;
/// CSTS.RDY.
pub(super) const CSTS_READY: u32 = 1;
/// CSTS.CFS.
pub(super) const CSTS_FATAL: u32 = 1 << 1;
/// CSTS.SHST.
pub(super) const CSTS_SHUTDOWN_MASK: u32 = 0b11 << 2;
/// CSTS.SHST: shutdown processing complete.
pub(super) const CSTS_SHUTDOWN_DONE: u32 = 0b10 << 2;

/// The registers a host can write, and which of their requests have been applied.
#[derive(Default)]
pub(super) struct RegisterFile {
    pub(super) cc: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    pub(super) enabled: bool,
    pub(super) shutting_down: bool,
}

impl RegisterFile {
    /// Page size of CC.MPS in bytes, if CAP allows it.
    pub(super) fn page(&self) -> Option<u32> {
        let mps = self.cc >> 7 & 0b1111;
        (mps <= MPSMAX).then(|| 4096 << mps)
    }

    /// True if CC.CSS is the NVM command set, or all if there are `several`, and CC.AMS is round robin.
    pub(super) fn command_set_is_valid(&self, several: bool) -> bool {
        let set = self.cc >> 4 & 0b111;
        (set == 0 || several && set == 0b110) && self.cc >> 11 & 0b111 == 0
    }

    /// True if CC.IOSQES and CC.IOCQES are 64 and 16 bytes.
    pub(super) fn entry_sizes_are_set(&self) -> bool {
        self.cc >> 16 & 0b1111 == 6 && self.cc >> 20 & 0b1111 == 4
    }

    /// Base and number of entries of the admin submission queue.
    pub(super) fn admin_sq(&self) -> (u64, u32) {
        (self.asq, (self.aqa & 0xfff) + 1)
    }

    /// Base and number of entries of the admin completion queue.
    pub(super) fn admin_cq(&self) -> (u64, u32) {
        (self.acq, (self.aqa >> 16 & 0xfff) + 1)
    }
}

/// Layout of BAR 0.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Size in bytes; a power of two.
    pub(super) size: u32,
    /// Offset of the MSI-X table.
    pub(super) table: u32,
}

impl Layout {
    pub(super) fn new(queues: u16, vectors: u16, stride: u8) -> Self {
        let doorbells = (u32::from(queues) + 1) * 2 * (4 << stride);
        let table = (0x1000 + doorbells).next_multiple_of(0x1000);
        let end = table + u32::from(vectors) * 16 + 0x1000;
        Self { size: end.next_power_of_two(), table }
    }
}
