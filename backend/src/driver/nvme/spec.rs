//! Data structures shared with the controller: queue entries and Identify data.
//!
//! All fields are little-endian and naturally aligned. The host is little-endian, too (`lib.rs` refuses others), so each
//! structure is plain `repr(C)`. Sizes and the offsets used are asserted at compile time.

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Admin opcodes. NVMe 2.0 §5, figure "Opcodes for Admin Commands"
pub(super) mod admin_opcode {
    pub(in crate::driver::nvme) const DELETE_IO_SQ: u8 = 0x00;
    pub(in crate::driver::nvme) const CREATE_IO_SQ: u8 = 0x01;
    pub(in crate::driver::nvme) const GET_LOG_PAGE: u8 = 0x02;
    pub(in crate::driver::nvme) const DELETE_IO_CQ: u8 = 0x04;
    pub(in crate::driver::nvme) const CREATE_IO_CQ: u8 = 0x05;
    pub(in crate::driver::nvme) const IDENTIFY: u8 = 0x06;
    pub(in crate::driver::nvme) const ABORT: u8 = 0x08;
    pub(in crate::driver::nvme) const SET_FEATURES: u8 = 0x09;
    pub(in crate::driver::nvme) const GET_FEATURES: u8 = 0x0a;
    pub(in crate::driver::nvme) const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// I/O opcodes. NVMe 2.0 §7.1, NVM Command Set 1.0 §3.2
pub(super) mod io_opcode {
    pub(in crate::driver::nvme) const FLUSH: u8 = 0x00;
    pub(in crate::driver::nvme) const WRITE: u8 = 0x01;
    pub(in crate::driver::nvme) const READ: u8 = 0x02;
    pub(in crate::driver::nvme) const WRITE_ZEROES: u8 = 0x08;
    pub(in crate::driver::nvme) const DATASET_MANAGEMENT: u8 = 0x09;
    // ZNS Command Set 1.1 §3.4
    pub(in crate::driver::nvme) const ZONE_MANAGEMENT_SEND: u8 = 0x79;
    pub(in crate::driver::nvme) const ZONE_MANAGEMENT_RECEIVE: u8 = 0x7a;
    pub(in crate::driver::nvme) const ZONE_APPEND: u8 = 0x7d;
}

/// Feature identifiers. NVMe 2.0 §5.27.1
pub(super) mod feature {
    pub(in crate::driver::nvme) const VOLATILE_WRITE_CACHE: u32 = 0x06;
    pub(in crate::driver::nvme) const NUMBER_OF_QUEUES: u32 = 0x07;
    pub(in crate::driver::nvme) const ASYNC_EVENTS: u32 = 0x0b;
}

/// CNS: selects the Identify data structure. NVMe 2.0 §5.17.1
pub(super) mod cns {
    pub(in crate::driver::nvme) const NAMESPACE: u32 = 0x00;
    pub(in crate::driver::nvme) const CONTROLLER: u32 = 0x01;
    pub(in crate::driver::nvme) const ACTIVE_NAMESPACES: u32 = 0x02;
    pub(in crate::driver::nvme) const DESCRIPTORS: u32 = 0x03;
    pub(in crate::driver::nvme) const COMMAND_SET_NAMESPACE: u32 = 0x05;
    pub(in crate::driver::nvme) const COMMAND_SET_CONTROLLER: u32 = 0x06;
}

/// Namespace Attribute Notices, in OAES and in Asynchronous Event Configuration. NVMe 2.0 §5.27.1.8
pub(super) const NAMESPACE_NOTICES: u32 = 1 << 8;

/// Write Zeroes, command dword 12: DEAC. NVM Command Set 1.0 §3.2.8
pub(super) const DEALLOCATE_ZEROED: u32 = 1 << 25;
/// Dataset Management, command dword 11: AD. NVM Command Set 1.0 §3.2.3
pub(super) const DEALLOCATE: u32 = 1 << 2;
/// Maximum ranges of one Dataset Management command, which fill a page. NVM Command Set 1.0 §3.2.3
pub(super) const MAX_RANGES: u16 = 256;

/// One range of Dataset Management. NVM Command Set 1.0 §3.2.3, figure "Dataset Management – Range Definition"
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DatasetRange {
    /// Context attributes: hints, which this driver leaves at 0.
    pub(super) attributes: u32,
    /// Number of logical blocks.
    pub(super) count: u32,
    /// First logical block.
    pub(super) first: u64,
}

/// Submission queue entry. NVMe 2.0 §3.3.3.1
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SubmissionEntry {
    /// Opcode.
    pub(super) opcode: u8,
    /// FUSE and PSDT; 0: not fused, data by PRPs.
    pub(super) flags: u8,
    /// Command identifier, unique among the commands in flight on the queue.
    pub(super) cid: u16,
    /// Namespace identifier; 0 if the command has none.
    pub(super) nsid: u32,
    /// Command specific.
    pub(super) cdw2: u32,
    /// Command specific.
    pub(super) cdw3: u32,
    /// Metadata pointer, unused.
    pub(super) mptr: u64,
    /// First PRP entry.
    pub(super) prp1: u64,
    /// Second PRP entry, or the address of the PRP list.
    pub(super) prp2: u64,
    /// Command specific, as are the rest.
    pub(super) cdw10: u32,
    /// See [`Self::cdw10`].
    pub(super) cdw11: u32,
    /// See [`Self::cdw10`].
    pub(super) cdw12: u32,
    /// See [`Self::cdw10`].
    pub(super) cdw13: u32,
    /// See [`Self::cdw10`].
    pub(super) cdw14: u32,
    /// See [`Self::cdw10`].
    pub(super) cdw15: u32,
}

impl SubmissionEntry {
    /// A command on a block range (the number of blocks is 0's based).
    #[inline]
    pub(super) fn on_blocks(opcode: u8, block: u64, count: impl Into<u64>) -> Self {
        let blocks = u16::try_from(count.into() - 1).expect("commands have at most 65536 blocks");
        let (low, high) = (block & 0xffff_ffff, block >> 32);
        Self {
            opcode,
            cdw10: u32::try_from(low).expect("masked"),
            cdw11: u32::try_from(high).expect("shifted"),
            cdw12: u32::from(blocks),
            ..Self::default()
        }
    }

    /// The entry as the words that the controller fetches. Built from the fields, not read back from the struct in memory:
    /// loading words after narrower stores stalls the CPU (failed store forwarding).
    #[inline]
    pub(super) fn words(&self) -> [u64; 8] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let dword0 = u32::from(self.opcode) | u32::from(self.flags) << 8 | u32::from(self.cid) << 16;
        [
            pair(dword0, self.nsid),
            pair(self.cdw2, self.cdw3),
            self.mptr,
            self.prp1,
            self.prp2,
            pair(self.cdw10, self.cdw11),
            pair(self.cdw12, self.cdw13),
            pair(self.cdw14, self.cdw15),
        ]
    }
}

/// Completion queue entry. NVMe 2.0 §3.3.3.2
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct CompletionEntry {
    /// Command specific.
    pub(super) result: u32,
    /// Command specific.
    pub(super) dw1: u32,
    /// SQ head pointer: how far the controller has read the submission queue.
    pub(super) sq_head: u16,
    /// Submission queue identifier.
    pub(super) sq_id: u16,
    /// Command identifier.
    pub(super) cid: u16,
    /// Bit 0: phase; bits 15:1: status field.
    pub(super) status: u16,
}

impl CompletionEntry {
    /// From the two words of one read.
    #[inline]
    pub(super) fn from_words(words: [u64; 2]) -> Self {
        zerocopy::transmute!(words)
    }
}

/// Identify Controller data structure, the fields that this driver reads. NVMe 2.0 §5.17.2.1
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IdentifyController {
    pub(super) vid: u16,
    pub(super) ssvid: u16,
    pub(super) sn: [u8; 20],
    pub(super) mn: [u8; 40],
    pub(super) fr: [u8; 8],
    pub(super) reserved_72: [u8; 4],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub(super) cmic: u8,
    pub(super) mdts: u8,
    pub(super) cntlid: u16,
    pub(super) ver: u32,
    pub(super) rtd3r: u32,
    pub(super) rtd3e: u32,
    /// Optional Asynchronous Events Supported.
    pub(super) oaes: u32,
    pub(super) reserved_96: [u8; 15],
    pub(super) cntrltype: u8,
    pub(super) reserved_112: [u8; 400],
    pub(super) sqes: u8,
    pub(super) cqes: u8,
    pub(super) maxcmd: u16,
    pub(super) nn: u32,
    pub(super) oncs: u16,
    pub(super) fuses: u16,
    pub(super) fna: u8,
    pub(super) vwc: u8,
    pub(super) awun: u16,
    pub(super) awupf: u16,
    pub(super) reserved_530: [u8; 6],
    pub(super) sgls: u32,
    pub(super) reserved_540: [u8; 3556],
}

/// I/O Command Set Specific Identify Controller for the NVM command set. NVM Command Set 1.0 §4.1.5.4
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IdentifyNvmController {
    pub(super) vsl: u8,
    /// Write Zeroes Size Limit: a power of two of the smallest page; 0: none.
    pub(super) wzsl: u8,
    pub(super) wusl: u8,
    /// Dataset Management Ranges Limit; 0: none.
    pub(super) dmrl: u8,
    /// Dataset Management Range Size Limit, logical blocks; 0: none.
    pub(super) dmrsl: u32,
    /// Dataset Management Size Limit, logical blocks; 0: none.
    pub(super) dmsl: u64,
    pub(super) reserved_16: [u8; 4080],
}

/// One LBA format. NVM Command Set 1.0 §4.1.5.1, figure "LBA Format Data Structure"
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct LbaFormat {
    /// MS: metadata bytes per block.
    pub(super) metadata: u16,
    /// LBADS: data bytes per block, as a power of two.
    pub(super) data_shift: u8,
    /// RP: relative performance.
    pub(super) performance: u8,
}

/// Identify Namespace data structure, the fields that this driver reads. NVM Command Set 1.0 §4.1.5.1
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IdentifyNamespace {
    pub(super) nsze: u64,
    pub(super) ncap: u64,
    pub(super) nuse: u64,
    pub(super) nsfeat: u8,
    pub(super) nlbaf: u8,
    pub(super) flbas: u8,
    pub(super) reserved_27: [u8; 2],
    /// End-to-end data protection type: 0 is none.
    pub(super) dps: u8,
    pub(super) reserved_30: [u8; 3],
    pub(super) dlfeat: u8,
    pub(super) reserved_34: [u8; 2],
    pub(super) nawupf: u16,
    pub(super) reserved_38: [u8; 4],
    /// NABO: the block at which the first atomic boundary is.
    pub(super) nabo: u16,
    pub(super) reserved_44: [u8; 2],
    /// NOIOB: a command should not cross a multiple of this many blocks; 0: none.
    pub(super) noiob: u16,
    pub(super) reserved_48: [u8; 16],
    pub(super) npwg: u16,
    pub(super) npwa: u16,
    pub(super) reserved_68: [u8; 4],
    pub(super) nows: u16,
    pub(super) reserved_74: [u8; 18],
    /// ANA group identifier.
    pub(super) anagrpid: u32,
    pub(super) reserved_96: [u8; 3],
    pub(super) nsattr: u8,
    pub(super) reserved_100: [u8; 4],
    pub(super) nguid: [u8; 16],
    pub(super) eui64: [u8; 8],
    pub(super) lbaf: [LbaFormat; 64],
    pub(super) reserved_384: [u8; 3712],
}

const _: () = {
    assert!(size_of::<SubmissionEntry>() == 64);
    assert!(offset_of!(SubmissionEntry, prp1) == 24);
    assert!(offset_of!(SubmissionEntry, cdw10) == 40);
    assert!(size_of::<CompletionEntry>() == 16);
    assert!(offset_of!(CompletionEntry, sq_head) == 8);

    assert!(size_of::<IdentifyController>() == 4096);
    assert!(offset_of!(IdentifyController, cmic) == 76);
    assert!(offset_of!(IdentifyController, mdts) == 77);
    assert!(offset_of!(IdentifyController, ver) == 80);
    assert!(offset_of!(IdentifyController, rtd3e) == 88);
    assert!(offset_of!(IdentifyController, oaes) == 92);
    assert!(offset_of!(IdentifyController, cntrltype) == 111);
    assert!(offset_of!(IdentifyController, sqes) == 512);
    assert!(offset_of!(IdentifyController, nn) == 516);
    assert!(offset_of!(IdentifyController, vwc) == 525);
    assert!(offset_of!(IdentifyController, awupf) == 528);
    assert!(offset_of!(IdentifyController, sgls) == 536);

    assert!(size_of::<DatasetRange>() * MAX_RANGES as usize == 4096);
    assert!(offset_of!(IdentifyController, oncs) == 520);

    assert!(size_of::<IdentifyNvmController>() == 4096);
    assert!(offset_of!(IdentifyNvmController, dmsl) == 8);

    assert!(size_of::<IdentifyNamespace>() == 4096);
    assert!(offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(offset_of!(IdentifyNamespace, dlfeat) == 33);
    assert!(offset_of!(IdentifyNamespace, flbas) == 26);
    assert!(offset_of!(IdentifyNamespace, dps) == 29);
    assert!(offset_of!(IdentifyNamespace, nawupf) == 36);
    assert!(offset_of!(IdentifyNamespace, nabo) == 42);
    assert!(offset_of!(IdentifyNamespace, noiob) == 46);
    assert!(offset_of!(IdentifyNamespace, npwg) == 64);
    assert!(offset_of!(IdentifyNamespace, nows) == 72);
    assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
    assert!(offset_of!(IdentifyNamespace, nsattr) == 99);
    assert!(offset_of!(IdentifyNamespace, lbaf) == 128);
};
