//! The wire format of the vfio-user protocol, in the byte order of the machine (vfio-user: "Protocol Specification"). The sizes
//! of all structures are asserted at the end of this file.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VFIO_USER_*` (vfio-user: "Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    DeviceGetInfo = 4,
    DeviceGetRegionInfo = 5,
    DeviceGetIrqInfo = 7,
    DeviceSetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    DeviceReset = 13,
}

impl Command {
    /// `None` for a command that is unknown, not supported, or sent only by servers.
    pub(super) fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            13 => Self::DeviceReset,
            _ => return None,
        })
    }
}

/// Bits 0–3 of [`Header::flags`]: the message type.
pub(super) const TYPE_MASK: u32 = 0xf;
/// A command.
pub(super) const TYPE_COMMAND: u32 = 0;
/// A reply to a command.
pub(super) const TYPE_REPLY: u32 = 1;
/// The client does not want a reply.
pub(super) const NO_REPLY: u32 = 1 << 4;
/// The command has failed; [`Header::error`] is an errno.
pub(super) const ERROR: u32 = 1 << 5;

/// The header of every message (vfio-user: "Header").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) id: u16,
    pub(super) command: u16,
    /// Length of the message with this header, in bytes.
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) error: u32,
}

/// Size of a [`Header`] in bytes.
pub(super) const HEADER: usize = size_of::<Header>();

/// Payload of `VFIO_USER_VERSION`; a NUL-terminated JSON text may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Version {
    pub(super) major: u16,
    pub(super) minor: u16,
}

/// [`DmaMap::flags`]: the device may read it.
pub(super) const MAP_READ: u32 = 1 << 0;
/// [`DmaMap::flags`]: the device may write it.
pub(super) const MAP_WRITE: u32 = 1 << 1;

/// Payload of `VFIO_USER_DMA_MAP`. The reply has no payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaMap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// [`DmaUnmap::flags`]: return a bitmap of dirty pages (`VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`). Not supported.
pub(super) const UNMAP_DIRTY_BITMAP: u32 = 1 << 0;
/// [`DmaUnmap::flags`]: unmap everything; address and size are zero (`VFIO_DMA_UNMAP_FLAG_ALL`).
pub(super) const UNMAP_ALL: u32 = 1 << 1;

/// Payload of `VFIO_USER_DMA_UNMAP` and of its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaUnmap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// [`DeviceInfo::flags`]: `VFIO_USER_DEVICE_RESET` is supported.
pub(super) const DEVICE_RESET: u32 = 1 << 0;
/// [`DeviceInfo::flags`]: a PCI device.
pub(super) const DEVICE_PCI: u32 = 1 << 1;

/// Payload of `VFIO_USER_DEVICE_GET_INFO` and of its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) num_regions: u32,
    pub(super) num_irqs: u32,
}

/// [`RegionInfo::flags`]: `VFIO_REGION_INFO_FLAG_*`.
pub(super) const REGION_READ: u32 = 1 << 0;
pub(super) const REGION_WRITE: u32 = 1 << 1;
pub(super) const REGION_MMAP: u32 = 1 << 2;
pub(super) const REGION_CAPS: u32 = 1 << 3;

/// Payload of `VFIO_USER_DEVICE_GET_REGION_INFO` and of its reply, where capabilities may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) cap_offset: u32,
    pub(super) size: u64,
    pub(super) offset: u64,
}

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`; `nr_areas` [`SparseArea`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseMmap {
    pub(super) id: u16,
    pub(super) version: u16,
    pub(super) next: u32,
    pub(super) nr_areas: u32,
    pub(super) reserved: u32,
}

impl SparseMmap {
    /// The only capability of a region.
    pub(super) fn new(nr_areas: u32) -> Self {
        Self { id: 1, version: 1, next: 0, nr_areas, reserved: 0 }
    }
}

/// A part of a region that can be mapped.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseArea {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// Payload of `VFIO_USER_DEVICE_GET_IRQ_INFO` and of its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) count: u32,
}

/// [`SetIrqs::flags`]: `VFIO_IRQ_SET_*`. Exactly one data flag and one action flag are set.
pub(super) const IRQ_DATA_NONE: u32 = 1 << 0;
pub(super) const IRQ_DATA_BOOL: u32 = 1 << 1;
pub(super) const IRQ_DATA_EVENTFD: u32 = 1 << 2;
pub(super) const IRQ_MASK: u32 = 1 << 3;
pub(super) const IRQ_UNMASK: u32 = 1 << 4;
pub(super) const IRQ_TRIGGER: u32 = 1 << 5;

/// Payload of `VFIO_USER_DEVICE_SET_IRQS`; with [`IRQ_DATA_BOOL`] one byte per vector follows. The reply has no payload.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetIrqs {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) start: u32,
    pub(super) count: u32,
}

/// Payload of `VFIO_USER_REGION_READ` and `VFIO_USER_REGION_WRITE`, and of their replies. The data follow in a write and in
/// the reply to a read.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionAccess {
    pub(super) offset: u64,
    pub(super) region: u32,
    pub(super) count: u32,
}

const _: () = {
    assert!(HEADER == 16);
    assert!(size_of::<Version>() == 4);
    assert!(size_of::<DmaMap>() == 32);
    assert!(size_of::<DmaUnmap>() == 24);
    assert!(size_of::<DeviceInfo>() == 16);
    assert!(size_of::<RegionInfo>() == 32);
    assert!(size_of::<SparseMmap>() == 16);
    assert!(size_of::<SparseArea>() == 16);
    assert!(size_of::<IrqInfo>() == 16);
    assert!(size_of::<SetIrqs>() == 20);
    assert!(size_of::<RegionAccess>() == 16);
};
