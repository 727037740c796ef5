//! Calls of a device cdev that only whole-function passthrough needs: regions that another process may map, and
//! `VFIO_DEVICE_SET_IRQS` with any index and start vector.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_irq_set,
};
use vfio_ioctls::VfioRegionDmaRange;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::handle::{Handle, Region, device_info};
use super::{Cdev, VFIO_DEVICE_SET_IRQS, irqs_set};
use crate::sys::Mmio;
use crate::whole_function::{IrqAction, IrqData, IrqInfo, IrqSet, RegionInfo};

/// Most vectors of one IRQ index (MSI-X: PCI Local Bus 3.0 §6.8.2.3).
const MAX_VECTORS: usize = 2048;

/// `struct vfio_irq_set` followed by space for the data of every vector.
#[repr(C)]
struct IrqSetBuffer {
    header: vfio_irq_set,
    data: [i32; MAX_VECTORS],
}

impl Cdev {
    /// Size and access rights of a region; all zero if the device has no such region.
    #[must_use]
    pub fn region_info(&self, index: u32) -> RegionInfo {
        let Region { size, flags, .. } = self.device.region(index);
        RegionInfo {
            size,
            readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
            writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        }
    }

    /// Offset of a region in the device file, in bytes.
    #[must_use]
    pub fn region_offset(&self, index: u32) -> u64 {
        self.device.offset(index)
    }

    /// The areas of a region that can be mapped, as offset and size in bytes. An empty list means the whole region; `None`
    /// means that nothing can be mapped.
    #[must_use]
    pub fn mmap_areas(&self, index: u32) -> Option<Vec<(u64, u64)>> {
        let Region { flags, areas, .. } = self.device.region(index);
        (flags & VFIO_REGION_INFO_FLAG_MMAP != 0).then(|| areas.unwrap_or_default())
    }

    /// A dma-buf of the whole region, if the kernel exports one that can be mapped (`VFIO_DEVICE_FEATURE_DMA_BUF`). Whoever
    /// holds it can only map this region. Linux 7.2 exports a dma-buf but does not allow it to be mapped.
    #[must_use]
    pub fn mappable_dma_buf(&self, index: u32) -> Option<OwnedFd> {
        let Handle::Cdev(device, _) = &self.device else { return None };
        if !self.mmap_areas(index)?.is_empty() {
            return None; // An area of the region would start at offset 0 of the dma-buf instead of its own offset.
        }
        let length = self.region_size(index);
        let ranges = [VfioRegionDmaRange { offset: 0, length }];
        let flags = u32::try_from(libc::O_RDWR | libc::O_CLOEXEC).ok()?;
        let file = device.export_dma_buf(index, &ranges, flags).ok()??;
        Mmio::map(file.as_fd(), 0, usize::try_from(length).ok()?).ok()?;
        Some(file.into())
    }

    /// True if the kernel can reset this device alone (`VFIO_DEVICE_FLAGS_RESET`).
    #[must_use]
    pub fn resettable(&self) -> bool {
        device_info(&self.device).is_ok_and(|info| info.flags & VFIO_DEVICE_FLAGS_RESET != 0)
    }

    /// Duplicates the descriptor, for another process. The duplicate grants the same access.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    /// Flags and number of vectors of an IRQ index; all zero if the device has no such index.
    #[must_use]
    pub fn irq_info(&self, index: u32) -> IrqInfo {
        self.device.irq(index)
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Errors
    /// The errno of the call; ENOSPC if the host has too few free vectors; EINVAL if the data is not for `set.count` vectors, or
    /// for too many.
    pub fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        let buffer = encode(set).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: the kernel reads `argsz` bytes, all of them inside `buffer`; see `encode`.
        irqs_set(unsafe { ioctl_with_ref(&self.device, VFIO_DEVICE_SET_IRQS(), &*buffer) })
    }
}

/// The argument of `VFIO_DEVICE_SET_IRQS`. `argsz` covers the header and the data, and never exceeds the buffer.
fn encode(set: &IrqSet<'_>) -> Option<Box<IrqSetBuffer>> {
    let mut buffer = Box::new(IrqSetBuffer { header: vfio_irq_set::default(), data: [0; MAX_VECTORS] });
    let count = usize::try_from(set.count).ok()?;
    let (kind, bytes) = match set.data {
        IrqData::None => (VFIO_IRQ_SET_DATA_NONE, 0),
        IrqData::Bools(bools) if bools.len() == count && count <= MAX_VECTORS => {
            for (word, chunk) in buffer.data.iter_mut().zip(bools.chunks(4)) {
                let mut bytes = [0; 4];
                bytes[..chunk.len()].copy_from_slice(chunk);
                *word = i32::from_ne_bytes(bytes);
            }
            (VFIO_IRQ_SET_DATA_BOOL, count)
        }
        IrqData::Eventfds(fds) if fds.len() == count && count <= MAX_VECTORS => {
            for (word, fd) in buffer.data.iter_mut().zip(fds) {
                *word = fd.map_or(-1, |fd| fd.as_raw_fd());
            }
            (VFIO_IRQ_SET_DATA_EVENTFD, 4 * count)
        }
        IrqData::Bools(_) | IrqData::Eventfds(_) => return None,
    };
    let action = match set.action {
        IrqAction::Mask => VFIO_IRQ_SET_ACTION_MASK,
        IrqAction::Unmask => VFIO_IRQ_SET_ACTION_UNMASK,
        IrqAction::Trigger => VFIO_IRQ_SET_ACTION_TRIGGER,
    };
    buffer.header = vfio_irq_set {
        argsz: u32::try_from(size_of::<vfio_irq_set>() + bytes).ok()?,
        flags: kind | action,
        index: set.index,
        start: set.start,
        count: set.count,
        ..Default::default()
    };
    Some(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(data: IrqData<'_>, count: u32) -> IrqSet<'_> {
        IrqSet { index: 2, start: 3, count, action: IrqAction::Trigger, data }
    }

    #[test]
    fn a_missing_eventfd_is_minus_one_and_argsz_covers_all() {
        let event = std::fs::File::open("/dev/null").unwrap();
        let fds = [Some(event.as_fd()), None];

        let buffer = encode(&set(IrqData::Eventfds(&fds), 2)).unwrap();

        assert_eq!(buffer.data[..2], [event.as_raw_fd(), -1]);
        let header = &buffer.header;
        assert_eq!((header.argsz, header.index, header.start, header.count), (20 + 8, 2, 3, 2));
        assert_eq!(header.flags, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER);
    }

    #[test]
    fn bools_are_packed_and_data_of_the_wrong_length_is_refused() {
        let buffer = encode(&set(IrqData::Bools(&[1, 0, 1, 0, 1]), 5)).unwrap();
        assert_eq!(buffer.data[..2], [0x0001_0001, 1]);
        assert_eq!(buffer.header.argsz, 25);

        assert!(encode(&set(IrqData::Bools(&[1]), 2)).is_none());
        assert!(encode(&set(IrqData::Eventfds(&[]), 1)).is_none());
        assert!(encode(&set(IrqData::Bools(&[0; MAX_VECTORS + 1]), 2049)).is_none());
    }
}
