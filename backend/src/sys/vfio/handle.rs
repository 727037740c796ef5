//! A device's open file, by its cdev or through its group. Both tell regions and interrupts in the same words. `vfio-ioctls`
//! reads them from a cdev, and this module from a file of a group, which that crate opens only with a container of its own.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE, vfio_device_info, vfio_irq_info, vfio_region_info};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref};
use vmm_sys_util::ioctl_io_nr;

use crate::sys::{DeviceId, Group};
use crate::whole_function::{IRQS, IrqInfo, REGIONS};

ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE as u32, VFIO_BASE + 9);

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
const CAP_SPARSE_MMAP: u32 = 1;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
const REGION_HAS_CAPS: u32 = 1 << 3;
/// `struct vfio_region_info`, in bytes.
const REGION_HEADER: usize = size_of::<vfio_region_info>();
/// Longest answer about a region that is accepted, in bytes. An area that can be mapped takes 16.
const MAX_REGION_INFO: usize = 4096;

/// See the top of this file.
pub(super) enum Handle {
    /// By its cdev, bound to an iommufd.
    Cdev(ManuallyDrop<VfioDevice>, DeviceId),
    /// Through its group.
    Group(GroupDevice),
}

/// A device's file from `VFIO_GROUP_GET_DEVICE_FD`.
pub(super) struct GroupDevice {
    // Before the group, which the kernel keeps in its container as long as this file is open.
    file: File,
    regions: Vec<Region>,
    irqs: Vec<IrqInfo>,
    _group: Group,
}

/// Size, offset in the device's file (both bytes), flags and the areas that can be mapped of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) flags: u32,
    pub(super) size: u64,
    pub(super) offset: u64,
    /// Offset and size of each area, in bytes; `None` if the kernel lists none, which means the whole region.
    pub(super) areas: Option<Vec<(u64, u64)>>,
}

impl Handle {
    /// A region; all zero if the device has no such region.
    pub(super) fn region(&self, index: u32) -> Region {
        match self {
            Self::Cdev(device, _) => Region {
                flags: device.get_region_flags(index),
                size: device.get_region_size(index),
                offset: device.get_region_offset(index),
                areas: device.get_region_caps(index).into_iter().find_map(|capability| match capability {
                    VfioRegionInfoCap::SparseMmap(map) => Some(map.areas.iter().map(|a| (a.offset, a.size)).collect()),
                    _ => None,
                }),
            },
            Self::Group(device) => device.regions.get(index as usize).cloned().unwrap_or_default(),
        }
    }

    /// Offset of a region in the file, in bytes.
    pub(super) fn offset(&self, index: u32) -> u64 {
        match self {
            Self::Cdev(device, _) => device.get_region_offset(index),
            Self::Group(device) => device.regions.get(index as usize).map_or(0, |region| region.offset),
        }
    }

    /// Flags and number of vectors of an IRQ index; all zero if the device has no such index.
    pub(super) fn irq(&self, index: u32) -> IrqInfo {
        match self {
            Self::Cdev(device, _) => {
                let irq = device.get_irq_info(index);
                irq.map_or_else(IrqInfo::default, |irq| IrqInfo { flags: irq.flags, count: irq.count })
            }
            Self::Group(device) => device.irqs.get(index as usize).copied().unwrap_or_default(),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            // SAFETY: `device` owns the descriptor, which stays open as long as `self` is borrowed.
            Self::Cdev(device, _) => unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) },
            Self::Group(device) => device.file.as_fd(),
        }
    }
}

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// `VFIO_DEVICE_GET_INFO`.
pub(super) fn device_info(device: &impl AsRawFd) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info { argsz: size_u32::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the kernel writes at most `argsz` bytes, all of them inside `info`.
    let result = unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_INFO(), &mut info) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}

impl GroupDevice {
    /// Reads what the device has. `file` is of a device in `group`.
    pub(super) fn new(file: File, group: Group) -> io::Result<Self> {
        let info = device_info(&file)?;
        // A device may lack one of them, such as the VGA region: the kernel then answers EINVAL.
        let regions = (0..info.num_regions.min(REGIONS)).map(|index| read_region(&file, index).unwrap_or_default());
        let irqs = (0..info.num_irqs.min(IRQS)).map(|index| read_irq(&file, index).unwrap_or_default());
        let (regions, irqs) = (regions.collect(), irqs.collect());
        Ok(Self { file, regions, irqs, _group: group })
    }
}

fn read_region(file: &File, index: u32) -> io::Result<Region> {
    let mut bytes = REGION_HEADER;
    loop {
        let mut words = vec![0_u64; bytes.div_ceil(8)];
        let argsz = u32::try_from(words.len() * 8).map_err(io::Error::other)?;
        words[0] = argsz.into(); // argsz and no flags: x86 and Arm64 are little-endian.
        words[1] = index.into();
        // SAFETY: the kernel writes at most `argsz` bytes, and `words` holds that many.
        if unsafe { ioctl_with_mut_ptr(file, VFIO_DEVICE_GET_REGION_INFO(), words.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let answer: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let needed = word_at(&answer, 0).unwrap_or_default() as usize;
        if needed <= answer.len() || needed > MAX_REGION_INFO {
            return parse_region(&answer).ok_or(io::ErrorKind::InvalidData.into());
        }
        bytes = needed;
    }
}

/// Parses `struct vfio_region_info` and its chain of capabilities.
fn parse_region(answer: &[u8]) -> Option<Region> {
    let (flags, mut at) = (word_at(answer, 4)?, word_at(answer, 12)? as usize);
    let (size, offset) = (long_at(answer, 16)?, long_at(answer, 24)?);
    let mut areas = None;
    while flags & REGION_HAS_CAPS != 0 && at != 0 {
        if word_at(answer, at)? & 0xffff == CAP_SPARSE_MMAP {
            let count = word_at(answer, at + 8)? as usize;
            let area = |n: usize| Some((long_at(answer, at + 16 + 16 * n)?, long_at(answer, at + 24 + 16 * n)?));
            areas = Some((0..count).map_while(area).collect::<Vec<_>>()).filter(|areas| areas.len() == count);
        }
        let next = word_at(answer, at + 4)? as usize;
        at = if next > at { next } else { 0 };
    }
    Some(Region { flags, size, offset, areas })
}

fn read_irq(file: &File, index: u32) -> io::Result<IrqInfo> {
    let mut info = vfio_irq_info { argsz: size_u32::<vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: the kernel writes at most `argsz` bytes, all of them inside `info`.
    if unsafe { ioctl_with_mut_ref(file, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(IrqInfo { flags: info.flags, count: info.count })
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn long_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("kernel structures are small")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(flags: u32, cap_offset: u32, rest: &[u64]) -> Vec<u8> {
        let words = [0, flags, 2, cap_offset].into_iter().flat_map(u32::to_ne_bytes);
        words.chain([0x4000, 2 << 40].iter().chain(rest).flat_map(|long: &u64| long.to_ne_bytes())).collect()
    }

    #[test]
    fn a_region_without_capabilities_can_be_mapped_whole() {
        let region = parse_region(&answer(7, 0, &[])).unwrap();
        assert_eq!(region, Region { flags: 7, size: 0x4000, offset: 2 << 40, areas: None });
    }

    #[test]
    fn the_areas_around_an_msix_table_are_read_from_the_chain() {
        let sparse = [1 | 1 << 16, 2, 0, 0x1000, 0x2000, 0x2000];
        let region = parse_region(&answer(0xf, 32, &sparse)).unwrap();
        assert_eq!(region.areas, Some(vec![(0, 0x1000), (0x2000, 0x2000)]));
    }

    #[test]
    fn an_answer_that_is_cut_off_is_no_region() {
        let whole = answer(0xf, 32, &[3, 0]);
        for cut in 0..40 {
            assert_eq!(parse_region(&whole[..cut]), None, "{cut} bytes");
        }
    }
}
