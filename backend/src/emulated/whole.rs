//! Whole-function passthrough. Registers can only be accessed by message, not mapped: a doorbell acts when it is written, and
//! a write to mapped memory would go unnoticed.

use std::io;

use rustix::io::Errno;

use crate::hardware::{Function, InterruptKind, Registers};
use crate::whole_function::{
    CONFIG_REGION, IrqAction, IrqData, IrqInfo, IrqSet, RegionInfo, RegionMmap, WholeFunction,
};

use super::function::EmulatedFunction;

/// `VFIO_PCI_BAR0_REGION_INDEX`.
const BAR0: u32 = 0;
/// `VFIO_PCI_INTX_IRQ_INDEX`.
const INTX: u32 = 0;
/// `VFIO_PCI_MSI_IRQ_INDEX`.
const MSI: u32 = 1;
/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;
/// `VFIO_PCI_ERR_IRQ_INDEX`; never signalled, because no PCIe errors are emulated.
const ERROR: u32 = 3;
/// `VFIO_PCI_REQ_IRQ_INDEX`.
const REQUEST: u32 = 4;
/// `VFIO_IRQ_INFO_EVENTFD`.
const EVENTFD: u32 = 1;
/// `VFIO_IRQ_INFO_MASKABLE` and `VFIO_IRQ_INFO_AUTOMASKED`.
const MASKED: u32 = 1 << 1 | 1 << 2;
/// `VFIO_IRQ_INFO_NORESIZE`.
const NORESIZE: u32 = 1 << 3;

impl WholeFunction for EmulatedFunction {
    fn region(&self, index: u32) -> RegionInfo {
        let size = match index {
            BAR0 => self.bar().size() as u64,
            CONFIG_REGION => super::config::SIZE as u64,
            _ => return RegionInfo::default(),
        };
        RegionInfo { size, readable: true, writable: true }
    }

    fn region_mmap(&self, _index: u32) -> io::Result<Option<RegionMmap>> {
        Ok(None)
    }

    fn region_read(&self, index: u32, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (bar, mut at) = (self.bar(), self.bar_offset(index, offset, bytes.len())?);
        let mut rest = bytes;
        while !rest.is_empty() {
            let width = width(at, rest.len());
            let (part, next) = rest.split_at_mut(width);
            match width {
                8 => part.copy_from_slice(&bar.read64(at).to_le_bytes()),
                4 => part.copy_from_slice(&bar.read32(at).to_le_bytes()),
                // Part of a register: read the whole dword.
                _ => part[0] = bar.read32(at & !3).to_le_bytes()[at & 3],
            }
            (at, rest) = (at + width, next);
        }
        Ok(())
    }

    fn region_write(&self, index: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (bar, mut at) = (self.bar(), self.bar_offset(index, offset, bytes.len())?);
        let mut rest = bytes;
        while !rest.is_empty() {
            let width = width(at, rest.len());
            let (part, next) = rest.split_at(width);
            match *part {
                [a, b, c, d, e, f, g, h] => bar.write64(at, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                [a, b, c, d] => bar.write32(at, u32::from_le_bytes([a, b, c, d])),
                // A partial register write is undefined (NVMe 2.0 §3.1.2). It is ignored.
                _ => {}
            }
            (at, rest) = (at + width, next);
        }
        Ok(())
    }

    fn resettable(&self) -> bool {
        true
    }

    fn irq(&self, index: u32) -> IrqInfo {
        match index {
            INTX => IrqInfo { flags: EVENTFD | MASKED, count: self.vectors(InterruptKind::Intx).into() },
            MSI => IrqInfo { flags: EVENTFD | NORESIZE, count: self.vectors(InterruptKind::Msi).into() },
            MSIX => IrqInfo { flags: EVENTFD, count: self.vectors(InterruptKind::MsiX).into() },
            ERROR | REQUEST => IrqInfo { flags: EVENTFD | NORESIZE, count: 1 },
            _ => IrqInfo::default(),
        }
    }

    fn set_irqs(&self, set: &IrqSet<'_>) -> io::Result<()> {
        match (set.index, set.action, set.data) {
            (INTX, IrqAction::Mask, IrqData::None | IrqData::Bools([1])) if set.count == 1 => {
                self.controller.mask_line();
                Ok(())
            }
            (INTX, IrqAction::Unmask, IrqData::None | IrqData::Bools([1])) if set.count == 1 => self.unmask_intx(),
            (INTX..=MSIX, IrqAction::Trigger, IrqData::None) if set.count == 0 => {
                self.controller.unroute();
                Ok(())
            }
            (INTX..=MSIX, IrqAction::Trigger, IrqData::Eventfds(events)) if events.len() == set.count as usize => {
                let kind = [InterruptKind::Intx, InterruptKind::Msi, InterruptKind::MsiX][set.index as usize];
                self.controller.route_from(kind, set.start as usize, events)
            }
            (ERROR, IrqAction::Trigger, _) => Ok(()),
            // As VFIO does: a software trigger signals the eventfd that is set (`vfio_pci_set_ctx_trigger_single`).
            (REQUEST, IrqAction::Trigger, IrqData::None | IrqData::Bools([1])) if set.count == 1 => {
                self.request_removal();
                Ok(())
            }
            _ => Err(Errno::INVAL.into()),
        }
    }
}

impl EmulatedFunction {
    /// The offset of an access in BAR 0; EINVAL unless the access is all inside.
    fn bar_offset(&self, index: u32, offset: u64, count: usize) -> io::Result<usize> {
        let offset = usize::try_from(offset).ok().filter(|_| index == BAR0);
        let end = offset.and_then(|offset| offset.checked_add(count));
        offset.filter(|_| end.is_some_and(|end| end <= self.bar().size())).ok_or(Errno::INVAL.into())
    }
}

/// Width of the next access: the largest of 8, 4 and 1 bytes that alignment and length allow.
fn width(at: usize, len: usize) -> usize {
    [8, 4].into_iter().find(|width| at.is_multiple_of(*width) && len >= *width).unwrap_or(1)
}
