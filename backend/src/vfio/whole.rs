//! A whole function under VFIO: accesses to regions and interrupts go to the kernel unchanged.

use std::io;

use super::Attached;
use crate::whole_function::{IrqInfo, IrqSet, MmapArea, RegionInfo, RegionMmap, WholeFunction};

/// What the bound device file allows its holder. It cannot map memory for DMA, which needs the iommufd.
const CDEV_RIGHTS: &str = "the device's own file, which also allows reset, interrupts, configuration space, attach and detach, as with \
                           plain vfio-pci";
/// What a device file from a group allows its holder. It cannot map memory for DMA either, which needs the container.
const GROUP_DEVICE_RIGHTS: &str =
    "the device's own file, which also allows reset, interrupts and configuration space, as with plain vfio-pci";
const DMA_BUF_RIGHTS: &str = "a dma-buf of this BAR, which allows mapping only";

impl WholeFunction for Attached {
    fn region(&self, index: u32) -> RegionInfo {
        self.cdev.region_info(index)
    }

    fn region_mmap(&self, index: u32) -> io::Result<Option<RegionMmap>> {
        let cdev = &self.cdev;
        let Some(areas) = cdev.mmap_areas(index) else { return Ok(None) };
        let areas: Vec<_> = areas.into_iter().map(|(offset, size)| MmapArea { offset, size }).collect();
        if let Some(file) = cdev.mappable_dma_buf(index) {
            return Ok(Some(RegionMmap { file, offset: 0, areas, own_file: false, rights: DMA_BUF_RIGHTS }));
        }
        let (file, offset) = (cdev.duplicate()?, cdev.region_offset(index));
        let rights = if self.is_of_group() { GROUP_DEVICE_RIGHTS } else { CDEV_RIGHTS };
        Ok(Some(RegionMmap { file, offset, areas, own_file: true, rights }))
    }

    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.cdev.read_region(index, offset, bytes)
    }

    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.cdev.write_region(index, offset, bytes)
    }

    fn resettable(&self) -> bool {
        self.cdev.resettable()
    }

    fn irq(&self, index: u32) -> IrqInfo {
        self.cdev.irq_info(index)
    }

    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        self.cdev.set_irqs(set)
    }
}
