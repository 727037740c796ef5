//! The bytes of the vfio-user protocol, in the byte order of the machine (vfio-user: "Protocol Specification"). Requests
//! are read and replies written with these structures alone; their sizes are asserted where they stand.

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
    /// `None` for a command that is unknown, that only a server sends, or that this server does not offer.
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

/// Bits 0–3 of [`Header::flags`]: what kind of message it is.
pub(super) const TYPE_MASK: u32 = 0xf;
/// A command.
pub(super) const TYPE_COMMAND: u32 = 0;
/// A reply to a command.
pub(super) const TYPE_REPLY: u32 = 1;
/// The sender of the command wants no reply.
pub(super) const NO_REPLY: u32 = 1 << 4;
/// The command has failed; [`Header::error`] is an errno.
pub(super) const ERROR: u32 = 1 << 5;

/// What starts every message (vfio-user: "Header").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) id: u16,
    pub(super) command: u16,
    /// Bytes of the whole message, this header included.
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) error: u32,
}

/// Bytes of a [`Header`].
pub(super) const HEADER: usize = size_of::<Header>();

/// Of `VFIO_USER_VERSION`; a JSON text with a NUL at its end may follow.
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

/// Of `VFIO_USER_DMA_MAP`; the reply is a header alone.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaMap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// [`DmaUnmap::flags`]: a bitmap of dirty pages is wanted (`VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`); not offered.
pub(super) const UNMAP_DIRTY_BITMAP: u32 = 1 << 0;
/// [`DmaUnmap::flags`]: everything goes; address and size are zero (`VFIO_DMA_UNMAP_FLAG_ALL`).
pub(super) const UNMAP_ALL: u32 = 1 << 1;

/// Of `VFIO_USER_DMA_UNMAP`, and of its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaUnmap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) address: u64,
    pub(super) size: u64,
}

/// [`DeviceInfo::flags`]: `VFIO_USER_DEVICE_RESET` works.
pub(super) const DEVICE_RESET: u32 = 1 << 0;
/// [`DeviceInfo::flags`]: it is a PCI device.
pub(super) const DEVICE_PCI: u32 = 1 << 1;

/// Of `VFIO_USER_DEVICE_GET_INFO`, and of its reply.
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

/// Of `VFIO_USER_DEVICE_GET_REGION_INFO`, and of its reply, which capabilities may follow.
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

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`, which as many [`SparseArea`]s as it says follow.
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
    /// The only capability of a region, for `nr_areas` areas.
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

/// Of `VFIO_USER_DEVICE_GET_IRQ_INFO`, and of its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) count: u32,
}

/// [`SetIrqs::flags`]: `VFIO_IRQ_SET_*`. One of the first three and one of the last three are set.
pub(super) const IRQ_DATA_NONE: u32 = 1 << 0;
pub(super) const IRQ_DATA_BOOL: u32 = 1 << 1;
pub(super) const IRQ_DATA_EVENTFD: u32 = 1 << 2;
pub(super) const IRQ_MASK: u32 = 1 << 3;
pub(super) const IRQ_UNMASK: u32 = 1 << 4;
pub(super) const IRQ_TRIGGER: u32 = 1 << 5;

/// Of `VFIO_USER_DEVICE_SET_IRQS`; with [`IRQ_DATA_BOOL`] a byte for each vector follows. The reply is a header alone.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SetIrqs {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) start: u32,
    pub(super) count: u32,
}

/// Of `VFIO_USER_REGION_READ` and `VFIO_USER_REGION_WRITE`, and of their replies. The data follow in a write and in the
/// reply to a read.
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
