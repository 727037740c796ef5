//! Queue entries, opcodes and status codes. The layout constants are not shared with the driver, so that a mistake in one of
//! them cannot hide in both.

/// Size of a submission queue entry in bytes, `1 << 6` (NVMe 2.0 §3.3.3.1).
pub(super) const SQE_BYTES: u64 = 64;
/// Size of a completion queue entry in bytes, `1 << 4` (NVMe 2.0 §3.3.3.2).
pub(super) const CQE_BYTES: u64 = 16;

/// A fetched submission queue entry as 64-bit words (NVMe 2.0 §3.3.3.1, Figure 87).
#[derive(Clone, Copy, Default)]
pub(super) struct Entry(pub(super) [u64; 8]);

impl Entry {
    /// The dword at byte `offset`.
    pub(super) fn u32(&self, offset: usize) -> u32 {
        let (low, high) = halves(self.0[offset / 8]);
        if offset.is_multiple_of(8) { low } else { high }
    }

    /// The quadword at byte `offset`.
    pub(super) fn u64(&self, offset: usize) -> u64 {
        self.0[offset / 8]
    }

    pub(super) fn opcode(&self) -> u8 {
        self.0[0].to_le_bytes()[0]
    }

    /// FUSE: nonzero for a fused operation.
    pub(super) fn fuse(&self) -> u8 {
        self.0[0].to_le_bytes()[1] & 0b11
    }

    /// PSDT: 0 for PRPs, 1 or 2 for SGLs.
    pub(super) fn psdt(&self) -> u8 {
        self.0[0].to_le_bytes()[1] >> 6
    }

    pub(super) fn cid(&self) -> u16 {
        low16(self.u32(0) >> 16)
    }

    pub(super) fn nsid(&self) -> u32 {
        self.u32(4)
    }

    pub(super) fn prp1(&self) -> u64 {
        self.u64(24)
    }

    pub(super) fn prp2(&self) -> u64 {
        self.u64(32)
    }

    /// Command dword `n`, 10 to 15.
    pub(super) fn cdw(&self, n: usize) -> u32 {
        self.u32(n * 4)
    }
}

/// The low 16 bits.
pub(super) fn low16(value: u32) -> u16 {
    u16::try_from(value & 0xffff).expect("masked to 16 bits")
}

/// The high 16 bits.
pub(super) fn high16(value: u32) -> u16 {
    low16(value >> 16)
}

/// The low and the high 32 bits.
pub(super) fn halves(value: u64) -> (u32, u32) {
    let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).expect("masked to 32 bits");
    (half(value), half(value >> 32))
}

/// Opcodes of the admin command set (NVMe 2.0 §5, Figure 138).
pub(super) mod admin {
    pub(in super::super) const DELETE_IO_SQ: u8 = 0x00;
    pub(in super::super) const CREATE_IO_SQ: u8 = 0x01;
    pub(in super::super) const GET_LOG_PAGE: u8 = 0x02;
    pub(in super::super) const DELETE_IO_CQ: u8 = 0x04;
    pub(in super::super) const CREATE_IO_CQ: u8 = 0x05;
    pub(in super::super) const IDENTIFY: u8 = 0x06;
    pub(in super::super) const ABORT: u8 = 0x08;
    pub(in super::super) const SET_FEATURES: u8 = 0x09;
    pub(in super::super) const GET_FEATURES: u8 = 0x0a;
    pub(in super::super) const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// Opcodes of the NVM command set (NVM Command Set 1.0 §3.2, Figure 20; Flush: NVMe 2.0 §7.1).
pub(super) mod nvm {
    pub(in super::super) const FLUSH: u8 = 0x00;
    pub(in super::super) const WRITE: u8 = 0x01;
    pub(in super::super) const READ: u8 = 0x02;
    pub(in super::super) const WRITE_ZEROES: u8 = 0x08;
    pub(in super::super) const DATASET_MANAGEMENT: u8 = 0x09;
    // Zoned Namespace command set (ZNS Command Set 1.1 §3.4).
    pub(in super::super) const ZONE_MANAGEMENT_SEND: u8 = 0x79;
    pub(in super::super) const ZONE_MANAGEMENT_RECEIVE: u8 = 0x7a;
    pub(in super::super) const ZONE_APPEND: u8 = 0x7d;
}

/// The status field of a completion without its phase bit (NVMe 2.0 §3.3.3.2.1): code in bits 7:0, code type in bits 10:8,
/// Do Not Retry in bit 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u16);

impl Status {
    /// Successful Completion.
    pub const SUCCESS: Self = Self(0);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Self = Self::new(0, 0x01).do_not_retry();
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Self = Self::new(0, 0x02).do_not_retry();
    /// Command ID Conflict.
    pub const ID_CONFLICT: Self = Self::new(0, 0x03).do_not_retry();
    /// Data Transfer Error.
    pub const DATA_TRANSFER_ERROR: Self = Self::new(0, 0x04);
    /// Internal Error.
    pub const INTERNAL_ERROR: Self = Self::new(0, 0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Self = Self::new(0, 0x07);
    /// Command Aborted due to SQ Deletion.
    pub const SQ_DELETED: Self = Self::new(0, 0x08);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Self = Self::new(0, 0x0b).do_not_retry();
    /// Command Sequence Error.
    pub const SEQUENCE_ERROR: Self = Self::new(0, 0x0c).do_not_retry();
    /// Invalid SGL Segment Descriptor.
    pub const SGL_SEGMENT_INVALID: Self = Self::new(0, 0x0d).do_not_retry();
    /// Invalid Number of SGL Descriptors.
    pub const SGL_COUNT_INVALID: Self = Self::new(0, 0x0e).do_not_retry();
    /// Data SGL Length Invalid.
    pub const SGL_LENGTH_INVALID: Self = Self::new(0, 0x0f).do_not_retry();
    /// SGL Descriptor Type Invalid.
    pub const SGL_TYPE_INVALID: Self = Self::new(0, 0x11).do_not_retry();
    /// PRP Offset Invalid.
    pub const PRP_OFFSET_INVALID: Self = Self::new(0, 0x13).do_not_retry();
    /// LBA Out of Range (NVM Command Set 1.0 §3.1.2).
    pub const LBA_OUT_OF_RANGE: Self = Self::new(0, 0x80).do_not_retry();
    /// Capacity Exceeded.
    pub const CAPACITY_EXCEEDED: Self = Self::new(0, 0x81);
    /// Completion Queue Invalid.
    pub const COMPLETION_QUEUE_INVALID: Self = Self::new(1, 0x00).do_not_retry();
    /// Invalid Queue Identifier.
    pub const INVALID_QUEUE_ID: Self = Self::new(1, 0x01).do_not_retry();
    /// Invalid Queue Size.
    pub const INVALID_QUEUE_SIZE: Self = Self::new(1, 0x02).do_not_retry();
    /// Asynchronous Event Request Limit Exceeded.
    pub const EVENT_LIMIT_EXCEEDED: Self = Self::new(1, 0x05).do_not_retry();
    /// Invalid Interrupt Vector.
    pub const INVALID_VECTOR: Self = Self::new(1, 0x08).do_not_retry();
    /// Invalid Log Page.
    pub const INVALID_LOG_PAGE: Self = Self::new(1, 0x09).do_not_retry();
    /// Invalid Queue Deletion.
    pub const INVALID_QUEUE_DELETION: Self = Self::new(1, 0x0c).do_not_retry();
    /// Feature Identifier Not Saveable.
    pub const FEATURE_NOT_SAVEABLE: Self = Self::new(1, 0x0d).do_not_retry();
    /// Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Self = Self::new(1, 0x0e).do_not_retry();
    /// Write Fault.
    pub const WRITE_FAULT: Self = Self::new(2, 0x80);
    /// Unrecovered Read Error.
    pub const READ_ERROR: Self = Self::new(2, 0x81);

    /// Status code `code` of type `kind` (0 generic, 1 command specific, 2 media, 7 vendor).
    #[must_use]
    pub const fn new(kind: u8, code: u8) -> Self {
        Self((((kind & 0b111) as u16) << 8) | code as u16)
    }

    /// The same status with Do Not Retry set: a retry would fail again.
    #[must_use]
    pub const fn do_not_retry(self) -> Self {
        Self(self.0 | 1 << 14)
    }

    /// The 15 bits of the status field above the phase bit.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }
}
