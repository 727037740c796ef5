//! `/dev/iommu`: wraps `iommufd-ioctls` so that the errno is kept, and adds the ioctls which that crate lacks.
//!
//! Each kind of object ID has its own type, so an IOAS cannot be passed where a page table is expected. A call either takes
//! effect or returns the errno. The only state is the list of page tables that could not be destroyed yet.

mod handed_over;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_IOAS_COPY, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_VFIO_IOAS, IOMMUFD_TYPE, iommu_hw_info,
    iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD as HW_INFO_INTEL_VTD, iommu_hw_info_vtd, iommu_hwpt_alloc,
    iommu_ioas_copy, iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_iova_range,
    iommu_vfio_ioas, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as MAP_WRITEABLE,
    iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR as VFIO_IOAS_CLEAR,
    iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET as VFIO_IOAS_SET,
};
use iommufd_ioctls::IommuFd;
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_DMA_CC_IOMMU, VFIO_TYPE};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use super::ioas::{Ioas, errno};
use super::{Owner, Ownership, SharedMemory};
use crate::addr::{Address, Iova, Span};

ioctl_io_nr!(IOMMU_IOAS_COPY, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_COPY);
ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_IOVA_RANGES);
ioctl_io_nr!(IOMMU_VFIO_IOAS, IOMMUFD_TYPE as u32, IOMMUFD_CMD_VFIO_IOAS);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);

/// An open `/dev/iommu`.
pub struct Iommufd {
    fd: Arc<IommuFd>,
    /// Page tables to which a device was attached when they were to be destroyed. Whoever has a device's file can attach it.
    busy: Mutex<Vec<HwptId>>,
    ownership: Ownership,
}

/// A hardware page table (HWPT), to which devices are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HwptId(pub(super) u32);

/// A bound device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub(super) u32);

/// Hardware information about the IOMMU that serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HwInfo {
    /// Intel VT-d, with its capability registers (VT-d 4.1 §11.4.2, §11.4.3).
    IntelVtd {
        /// Capability Register.
        cap: u64,
        /// Extended Capability Register.
        ecap: u64,
    },
    /// Any other IOMMU, with its value of `enum iommu_hw_info_type`.
    Other(u32),
}

/// `IOMMU_IOAS_MAP_*` flags of a mapping at a fixed IOVA.
fn map_flags(writable: bool) -> u32 {
    MAP_FIXED_IOVA | MAP_READABLE | if writable { MAP_WRITEABLE } else { 0 }
}

impl Iommufd {
    /// Opens `path`, normally `/dev/iommu`.
    ///
    /// # Errors
    /// The errno of `open`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::passed_in(File::options().read(true).write(true).open(path)?.into()))
    }

    /// An open `/dev/iommu` that was passed to this process. It is checked when it is used first.
    #[must_use]
    pub fn passed_in(file: OwnedFd) -> Self {
        let file = File::from(file);
        let (fd, busy) = (Arc::new(IommuFd::new_from_fd(file)), Mutex::default());
        Self { fd, busy, ownership: Ownership::new(Owner::ThisProcess) }
    }

    pub(super) fn inner(&self) -> &Arc<IommuFd> {
        &self.fd
    }

    /// Allocates an empty address space (`IOMMU_IOAS_ALLOC`).
    ///
    /// # Errors
    /// The errno of the call.
    pub fn alloc_ioas(&self) -> io::Result<Ioas> {
        Ioas::allocate(&self.fd, self.ownership.clone())
    }

    /// Pins `span.len()` bytes of `file` at `offset` and maps them at `span` (`IOMMU_IOAS_MAP_FILE`). The device may read
    /// them, and write them if `writable`.
    ///
    /// # Errors
    /// The errno of the call, among them ENOTTY before Linux 6.13, EINVAL for a file that is neither shmem nor hugetlbfs, and
    /// ENOMEM beyond `RLIMIT_MEMLOCK`.
    pub fn map_file(
        &self,
        ioas: &Ioas,
        file: BorrowedFd<'_>,
        offset: u64,
        span: Span<Iova>,
        writable: bool,
    ) -> io::Result<()> {
        let map = iommu_ioas_map_file {
            size: size_u32::<iommu_ioas_map_file>(),
            flags: map_flags(writable),
            ioas_id: ioas.number(),
            fd: file.as_raw_fd(),
            start: offset,
            length: span.len(),
            iova: span.start().raw(),
        };
        self.fd.map_iommu_ioas_file(&map).map_err(errno)
    }

    /// Pins the pages behind `shared`, starting at `offset`, and maps them at `span` (`IOMMU_IOAS_MAP`).
    ///
    /// # Errors
    /// The errno of the call; EINVAL if `span` is longer than the rest of `shared`.
    pub fn map_memory(
        &self,
        ioas: &Ioas,
        (shared, offset): (&SharedMemory, usize),
        span: Span<Iova>,
        writable: bool,
    ) -> io::Result<()> {
        let bytes = usize::try_from(span.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let part = shared.slice(offset, bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let map = iommu_ioas_map {
            size: size_u32::<iommu_ioas_map>(),
            flags: map_flags(writable),
            ioas_id: ioas.number(),
            __reserved: 0,
            user_va: part.host_address(),
            length: span.len(),
            iova: span.start().raw(),
        };
        self.fd.map_iommu_ioas(&map).map_err(errno)
    }

    /// Removes a mapping, and unpins its pages unless another address space also maps them (`IOMMU_IOAS_UNMAP`). On return
    /// the device can no longer reach them. The kernel refuses to unmap part of a mapping (ENOENT).
    ///
    /// # Errors
    /// The errno of the call.
    pub fn unmap(&self, ioas: &Ioas, span: Span<Iova>) -> io::Result<()> {
        let mut unmap = iommu_ioas_unmap {
            size: size_u32::<iommu_ioas_unmap>(),
            ioas_id: ioas.number(),
            iova: span.start().raw(),
            length: span.len(),
        };
        self.fd.unmap_iommu_ioas(&mut unmap).map_err(errno)
    }

    /// Copies the mapping at `span` from `from` to the same IOVA in `to`. Both share the pinned pages (`IOMMU_IOAS_COPY`).
    ///
    /// # Errors
    /// The errno of the call.
    pub fn copy(&self, from: &Ioas, to: &Ioas, span: Span<Iova>, writable: bool) -> io::Result<()> {
        let copy = iommu_ioas_copy {
            size: size_u32::<iommu_ioas_copy>(),
            flags: map_flags(writable),
            dst_ioas_id: to.number(),
            src_ioas_id: from.number(),
            length: span.len(),
            dst_iova: span.start().raw(),
            src_iova: span.start().raw(),
        };
        // SAFETY: the kernel reads only the structure, whose size field is correct.
        checked(unsafe { ioctl_with_ref(&*self.fd, IOMMU_IOAS_COPY(), &copy) }).map(drop)
    }

    /// The IOVA ranges in which mappings are currently allowed, in ascending order (`IOMMU_IOAS_IOVA_RANGES`). Attaching a
    /// device may narrow them.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn iova_ranges(&self, ioas: &Ioas) -> io::Result<Vec<Span<Iova>>> {
        let mut ranges: Vec<iommu_iova_range> = vec![iommu_iova_range::default(); 16];
        loop {
            let mut query = iommu_ioas_iova_ranges {
                size: size_u32::<iommu_ioas_iova_ranges>(),
                ioas_id: ioas.number(),
                num_iovas: u32::try_from(ranges.len()).map_err(io::Error::other)?,
                allowed_iovas: ranges.as_mut_ptr() as u64,
                ..Default::default()
            };
            // SAFETY: the kernel writes at most `num_iovas` entries to `allowed_iovas`, and `ranges` holds that many.
            let result = checked(unsafe { ioctl_with_mut_ref(&*self.fd, IOMMU_IOAS_IOVA_RANGES(), &mut query) });
            let count = query.num_iovas as usize;
            match result {
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && count > ranges.len() => {
                    ranges.resize(count, iommu_iova_range::default());
                }
                Err(error) => return Err(error),
                Ok(_) => {
                    let spans = ranges[..count].iter();
                    return Ok(spans.filter_map(|r| Span::inclusive(Iova(r.start), Iova(r.last))).collect());
                }
            }
        }
    }

    /// Allocates a page table for `device` that mirrors `ioas` (`IOMMU_HWPT_ALLOC`). From now on all mappings of `ioas` are
    /// pinned, even while no device is attached.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn alloc_hwpt(&self, device: DeviceId, ioas: &Ioas) -> io::Result<HwptId> {
        // By now the device may have been detached from them.
        self.busy().retain(|page_table| self.fd.destroy_iommu_object(page_table.0).is_err());
        let mut alloc = iommu_hwpt_alloc {
            size: size_u32::<iommu_hwpt_alloc>(),
            dev_id: device.0,
            pt_id: ioas.number(),
            ..Default::default()
        };
        self.fd.alloc_iommu_hwpt(&mut alloc).map_err(errno)?;
        Ok(HwptId(alloc.out_hwpt_id))
    }

    /// Frees a page table that no device is attached to (`IOMMU_DESTROY`). After EBUSY, the next [`Self::alloc_hwpt`] tries again.
    ///
    /// # Errors
    /// EBUSY while a device is attached.
    pub fn destroy_hwpt(&self, page_table: HwptId) -> io::Result<()> {
        let destroyed = self.fd.destroy_iommu_object(page_table.0).map_err(errno);
        destroyed.inspect_err(|_| self.busy().push(page_table))
    }

    fn busy(&self) -> MutexGuard<'_, Vec<HwptId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if every page table of `ioas` forces DMA to snoop the CPU caches
    /// (`VFIO_CHECK_EXTENSION(VFIO_DMA_CC_IOMMU)`). The kernel also says yes if `ioas` has no page table. The unused argument
    /// ensures that [`Self::alloc_hwpt`] has been called.
    ///
    /// # Errors
    /// The errno of the calls.
    pub fn snoop_enforced(&self, ioas: &Ioas, _page_table: HwptId) -> io::Result<bool> {
        let mut select = iommu_vfio_ioas {
            size: size_u32::<iommu_vfio_ioas>(),
            ioas_id: ioas.number(),
            op: u16::try_from(VFIO_IOAS_SET).map_err(io::Error::other)?,
            __reserved: 0,
        };
        // SAFETY: the kernel reads only the structure, whose size field is correct.
        checked(unsafe { ioctl_with_ref(&*self.fd, IOMMU_VFIO_IOAS(), &select) })?;
        // SAFETY: the argument is a number; no memory is involved.
        let answer = checked(unsafe { ioctl_with_val(&*self.fd, VFIO_CHECK_EXTENSION(), VFIO_DMA_CC_IOMMU.into()) });
        // The compatibility IOAS slot holds a reference, with which the IOAS could not be destroyed.
        select.op = u16::try_from(VFIO_IOAS_CLEAR).map_err(io::Error::other)?;
        // SAFETY: as above.
        checked(unsafe { ioctl_with_ref(&*self.fd, IOMMU_VFIO_IOAS(), &select) })?;
        Ok(answer? == 1)
    }

    /// Hardware information about the IOMMU that serves `device` (`IOMMU_GET_HW_INFO`).
    ///
    /// # Errors
    /// The errno of the call.
    pub fn hw_info(&self, device: DeviceId) -> io::Result<HwInfo> {
        let mut vtd = iommu_hw_info_vtd::default();
        let mut query = iommu_hw_info {
            size: size_u32::<iommu_hw_info>(),
            dev_id: device.0,
            data_len: size_u32::<iommu_hw_info_vtd>(),
            data_uptr: std::ptr::from_mut(&mut vtd) as u64,
            ..Default::default()
        };
        self.fd.get_hw_info(&mut query).map_err(errno)?;
        // SAFETY: both members of the union are one u32.
        let kind = unsafe { query.__bindgen_anon_1.out_data_type };
        Ok(match kind {
            HW_INFO_INTEL_VTD => HwInfo::IntelVtd { cap: vtd.cap_reg, ecap: vtd.ecap_reg },
            other => HwInfo::Other(other),
        })
    }
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("kernel structures are small")
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
