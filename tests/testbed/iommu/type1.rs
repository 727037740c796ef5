//! The same questions through VFIO type1, for kernels without iommufd.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::{Answers, VFIO_CHECK_EXTENSION, VFIO_DMA_CC_IOMMU, context, ioctl, link_name, open};

// linux/vfio.h: _IO(';', 100 + n).
const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const IOMMU_GET_INFO: libc::c_ulong = 0x3b70;
/// linux/vfio.h: `VFIO_TYPE1v2_IOMMU`.
const TYPE1V2: libc::c_ulong = 3;
/// linux/vfio.h: `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`.
const CAP_IOVA_RANGE: u16 = 1;
/// Bytes of `vfio_iommu_type1_info` with its capabilities; a host has a few ranges.
const INFO: usize = 4096;

/// Puts the group of the function at `at` into a container, and asks that.
pub(super) fn ask(at: &Path, answers: &mut Answers) -> io::Result<()> {
    let group = open(&Path::new("/dev/vfio").join(link_name(&at.join("iommu_group"))?))?;
    let container = open(Path::new("/dev/vfio/vfio"))?;
    ioctl("put the group into a container", &group, GROUP_SET_CONTAINER, &mut container.as_raw_fd())?;
    number("turn type1 on", &container, SET_IOMMU, TYPE1V2)?;
    answers.push(("interface", "type1".into()));
    let answer = number("check the coherency extension", &container, VFIO_CHECK_EXTENSION, VFIO_DMA_CC_IOMMU)?;
    answers.push(("dma_cc", answer.to_string()));
    answers.push(("iova_ranges", iova_ranges(&container)?));
    Ok(())
}

fn iova_ranges(container: &File) -> io::Result<String> {
    let mut info = [0_u32; INFO / 4];
    info[0] = u32::try_from(INFO).expect("4096");
    ioctl("ask for the IOMMU's properties", container, IOMMU_GET_INFO, &mut info)?;
    let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // linux/vfio.h, struct vfio_iommu_type1_info: cap_offset at 16. vfio_info_cap_header: id, version, next.
    let mut at = word(&bytes, 16) as usize;
    while at != 0 {
        if u16::from_ne_bytes([bytes[at], bytes[at + 1]]) == CAP_IOVA_RANGE {
            // vfio_iommu_type1_info_cap_iova_range: nr_iovas, reserved, then pairs of start and end.
            let count = word(&bytes, at + 8) as usize;
            let range =
                |n: usize| format!("{:#x}-{:#x}", long(&bytes, at + 16 + 16 * n), long(&bytes, at + 24 + 16 * n));
            return Ok((0..count).map(range).collect::<Vec<_>>().join(","));
        }
        at = word(&bytes, at + 4) as usize;
    }
    Ok("none".into())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn number(action: &str, file: &File, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: both requests take a number, not a pointer.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if answer < 0 { Err(context(action, &io::Error::last_os_error())) } else { Ok(answer) }
}
