//! Containers and groups of VFIO, with IOMMU type 1: the interface of kernels without iommufd (`<linux/vfio.h>`).
//!
//! A group is the functions that the IOMMU cannot tell apart. Its file can be open once, so whoever has it owns the group. A
//! container holds the mappings of the groups in it. It is empty, and answers nothing about an IOMMU, until a group has joined
//! and [`Container::enable`] was called. When its last group leaves, the kernel removes and unpins all its mappings.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DMA_CC_IOMMU, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE, VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

use super::SharedMemory;
use crate::addr::{Address, Iova, Span};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

/// Longest answer of `VFIO_IOMMU_GET_INFO` that is accepted, in bytes. An IOVA range takes 16.
const MAX_INFO: u32 = 64 << 10;

/// An open `/dev/vfio/vfio`.
#[derive(Debug)]
pub struct Container {
    file: File,
}

/// An open `/dev/vfio/N`.
#[derive(Debug)]
pub struct Group {
    file: File,
}

/// What `VFIO_IOMMU_GET_INFO` tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerInfo {
    /// The IOVA ranges in which mappings are allowed, in ascending order.
    pub ranges: Vec<Span<Iova>>,
    /// How many more mappings the kernel allows (the module parameter `dma_entry_limit`); `None` if it does not say.
    pub mappings_left: Option<u32>,
}

impl Container {
    /// Takes an open `/dev/vfio/vfio`.
    ///
    /// # Errors
    /// The errno of the call; [`io::ErrorKind::Unsupported`] for another version of the interface.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        // SAFETY: the ioctl takes no argument.
        match checked(unsafe { ioctl(&file, VFIO_GET_API_VERSION()) })? {
            version if version == VFIO_API_VERSION.cast_signed() => Ok(Self { file }),
            version => {
                Err(io::Error::new(io::ErrorKind::Unsupported, format!("VFIO_GET_API_VERSION is {version}, not 0")))
            }
        }
    }

    /// True if IOMMU type 1 is available, version 2, whose unmap is exact. Its driver is the module `vfio_iommu_type1`.
    #[must_use]
    pub fn has_type1(&self) -> bool {
        self.has(VFIO_TYPE1v2_IOMMU)
    }

    /// True if the IOMMU forces all DMA to snoop the CPU caches (`VFIO_DMA_CC_IOMMU`). Only after [`Self::enable`].
    #[must_use]
    pub fn snoop_enforced(&self) -> bool {
        self.has(VFIO_DMA_CC_IOMMU)
    }

    fn has(&self, extension: u32) -> bool {
        // SAFETY: the argument is a number; no memory is involved.
        unsafe { ioctl_with_val(&self.file, VFIO_CHECK_EXTENSION(), extension.into()) == 1 }
    }

    /// Turns IOMMU type 1 on for the groups in this container (`VFIO_SET_IOMMU`).
    ///
    /// # Errors
    /// The errno of the call: EPERM if the platform does not isolate interrupts.
    pub fn enable(&self) -> io::Result<()> {
        // SAFETY: the argument is a number; no memory is involved.
        checked(unsafe { ioctl_with_val(&self.file, VFIO_SET_IOMMU(), VFIO_TYPE1v2_IOMMU.into()) }).map(drop)
    }

    /// What the IOMMU allows (`VFIO_IOMMU_GET_INFO`).
    ///
    /// # Errors
    /// The errno of the call; [`io::ErrorKind::Unsupported`] if the kernel does not tell the IOVA ranges (before Linux 5.4).
    pub fn info(&self) -> io::Result<ContainerInfo> {
        let mut words = vec![0_u64; 16];
        loop {
            let bytes = u32::try_from(words.len() * 8).map_err(io::Error::other)?;
            words[0] = bytes.into(); // argsz and no flags: x86 and Arm64 are little-endian.
            // SAFETY: the kernel writes at most `argsz` bytes, and `words` holds that many.
            checked(unsafe { ioctl_with_mut_ptr(&self.file, VFIO_IOMMU_GET_INFO(), words.as_mut_ptr()) })?;
            let answer: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let needed = word_at(&answer, 0).unwrap_or_default();
            if needed > bytes && needed <= MAX_INFO {
                words = vec![0; (needed as usize).div_ceil(8)];
                continue;
            }
            let info = parse_info(&answer);
            return info.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the kernel tells no IOVA ranges"));
        }
    }

    /// Pins the pages behind `shared`, starting at `offset`, and maps them at `span` (`VFIO_IOMMU_MAP_DMA`). The device may read
    /// them, and write them if `writable`.
    ///
    /// # Errors
    /// The errno of the call: ENOMEM beyond `RLIMIT_MEMLOCK`, ENOSPC beyond `dma_entry_limit`, EFAULT for pages that a file has
    /// lost; EINVAL if `span` is longer than the rest of `shared`.
    pub fn map(&self, (shared, offset): (&SharedMemory, usize), span: Span<Iova>, writable: bool) -> io::Result<()> {
        let bytes = usize::try_from(span.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let part = shared.slice(offset, bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let map = vfio_iommu_type1_dma_map {
            argsz: size_u32::<vfio_iommu_type1_dma_map>(),
            flags: VFIO_DMA_MAP_FLAG_READ | if writable { VFIO_DMA_MAP_FLAG_WRITE } else { 0 },
            vaddr: part.host_address(),
            iova: span.start().raw(),
            size: span.len(),
        };
        // SAFETY: the kernel reads only the structure. The memory belongs to `shared`, which is only accessed by volatile and
        // atomic copies, so a device may change it at any time.
        checked(unsafe { ioctl_with_ref(&self.file, VFIO_IOMMU_MAP_DMA(), &map) }).map(drop)
    }

    /// Removes the mapping at exactly `span` and unpins its pages (`VFIO_IOMMU_UNMAP_DMA`). On return the device can no longer
    /// reach them.
    ///
    /// # Errors
    /// The errno of the call; ENOENT if other than `span.len()` bytes were mapped there.
    pub fn unmap(&self, span: Span<Iova>) -> io::Result<()> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_u32::<vfio_iommu_type1_dma_unmap>(),
            iova: span.start().raw(),
            size: span.len(),
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes only the structure; without flags it has no data.
        checked(unsafe { ioctl_with_mut_ref(&self.file, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) })?;
        if unmap.size == span.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
    }
}

impl Group {
    /// Takes an open `/dev/vfio/N`. Its `open` fails with EBUSY while anyone has the group's file, or the file of a function in it.
    #[must_use]
    pub fn new(file: OwnedFd) -> Self {
        Self { file: file.into() }
    }

    /// True if no function of the group belongs to a driver of the host (`VFIO_GROUP_GET_STATUS`).
    ///
    /// # Errors
    /// The errno of the call.
    pub fn is_viable(&self) -> io::Result<bool> {
        let mut status = vfio_group_status { argsz: size_u32::<vfio_group_status>(), flags: 0 };
        // SAFETY: the kernel writes only the structure.
        checked(unsafe { ioctl_with_mut_ref(&self.file, VFIO_GROUP_GET_STATUS(), &mut status) })?;
        Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    /// Puts the group into `container` (`VFIO_GROUP_SET_CONTAINER`). It leaves when this file and the files of its functions are
    /// closed.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn join(&self, container: &Container) -> io::Result<()> {
        let number = container.file.as_raw_fd();
        // SAFETY: the kernel reads one descriptor number, which is open as long as `container` lives.
        checked(unsafe { ioctl_with_ref(&self.file, VFIO_GROUP_SET_CONTAINER(), &number) }).map(drop)
    }

    /// Opens the function `name` of the group, such as `0000:00:04.0` (`VFIO_GROUP_GET_DEVICE_FD`), with close-on-exec.
    ///
    /// # Errors
    /// The errno of the call.
    pub fn device(&self, name: &CStr) -> io::Result<File> {
        // SAFETY: the kernel reads a string that ends with a zero byte.
        let number = checked(unsafe { ioctl_with_ptr(&self.file, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
        // SAFETY: the kernel has just created this descriptor, and nobody else knows it.
        Ok(unsafe { File::from_raw_fd(number) })
    }
}

/// Parses `struct vfio_iommu_type1_info` and its chain of capabilities. `None` if there is no list of IOVA ranges, or if the
/// answer is not as the header says.
fn parse_info(answer: &[u8]) -> Option<ContainerInfo> {
    if word_at(answer, 4)? & VFIO_IOMMU_INFO_CAPS == 0 {
        return None;
    }
    let (mut ranges, mut mappings_left) = (None, None);
    let mut at = word_at(answer, 16)? as usize;
    // The offset of each capability is greater than that of the previous one, so that a chain has an end.
    while at != 0 {
        let id = word_at(answer, at)? & 0xffff;
        match id {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => ranges = Some(parse_ranges(answer.get(at..)?)?),
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => mappings_left = Some(word_at(answer, at + 8)?),
            _ => {}
        }
        let next = word_at(answer, at + 4)? as usize;
        if next != 0 && next <= at {
            return None;
        }
        at = next;
    }
    Some(ContainerInfo { ranges: ranges?, mappings_left })
}

/// Parses `struct vfio_iommu_type1_info_cap_iova_range`.
fn parse_ranges(capability: &[u8]) -> Option<Vec<Span<Iova>>> {
    let count = word_at(capability, 8)? as usize;
    let ranges = capability.get(16..)?.chunks_exact(16).take(count);
    let address = |bytes: &[u8]| Some(Iova(u64::from_ne_bytes(bytes.try_into().ok()?)));
    let spans: Vec<_> =
        ranges.filter_map(|range| Span::inclusive(address(&range[..8])?, address(&range[8..])?)).collect();
    (spans.len() == count).then_some(spans)
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("kernel structures are small")
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of Linux: the header, then capabilities, each with its offset.
    fn answer(capabilities: &[(u32, &[u32])]) -> Vec<u8> {
        let mut words = vec![0, VFIO_IOMMU_INFO_CAPS, 0x1000, 0, if capabilities.is_empty() { 0 } else { 24 }, 0];
        for (n, (id, body)) in capabilities.iter().enumerate() {
            let next = (words.len() + 2 + body.len()) * 4;
            words.extend([*id, if n + 1 < capabilities.len() { u32::try_from(next).unwrap() } else { 0 }]);
            words.extend(*body);
        }
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    const RANGES: (u32, &[u32]) =
        (VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, &[2, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, 0xffff_ffff, 0x7f]);

    #[test]
    fn ranges_and_mappings_left_are_read_from_the_chain_in_any_order() {
        let expected = ContainerInfo {
            ranges: [(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)]
                .map(|(first, last)| Span::inclusive(Iova(first), Iova(last)).unwrap())
                .to_vec(),
            mappings_left: Some(65_535),
        };
        let (unknown, left) = ((2, [0; 6].as_slice()), (VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, [65_535].as_slice()));
        assert_eq!(parse_info(&answer(&[RANGES, unknown, left])).as_ref(), Some(&expected));
        assert_eq!(parse_info(&answer(&[left, RANGES])), Some(expected));
        assert_eq!(parse_info(&answer(&[RANGES])).unwrap().mappings_left, None);
    }

    #[test]
    fn an_answer_without_ranges_or_with_a_bad_chain_is_refused() {
        assert_eq!(parse_info(&answer(&[])), None);
        assert_eq!(parse_info(&answer(&[(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, &[1])])), None);
        let good = answer(&[RANGES]);
        for cut in 0..good.len() {
            assert_eq!(parse_info(&good[..cut]), None, "{cut} bytes");
        }
        let mut circle = good;
        circle[28..32].copy_from_slice(&24_u32.to_ne_bytes());
        assert_eq!(parse_info(&circle), None, "the chain leads back to its first capability");
    }
}
