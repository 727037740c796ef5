//! PCI configuration space: the bytes, and a mask of the writable bits (PCI 3.0 §6, PCIe 5.0 §7.5).
//!
//! ```text
//! 0x00 header, class 01 08 02 (NVM Express)     0x40 power management -> 0x50 PCI Express -> 0xb0 MSI -> 0x90 MSI-X
//! ```
//!
//! Enable No Snoop (Device Control, bit 11) is either hardwired to zero or writable and set at power-on. PCIe 5.0 §7.5.3.4
//! allows both.

/// Size of PCI Express configuration space in bytes.
pub(super) const SIZE: usize = 4096;
/// Command register: Memory Space Enable, Bus Master Enable, Interrupt Disable.
pub(super) const COMMAND: usize = 0x04;
pub(super) const MEMORY_SPACE: u16 = 1 << 1;
pub(super) const BUS_MASTER: u16 = 1 << 2;
const INTERRUPT_DISABLE: u16 = 1 << 10;

/// Status register, low byte; Interrupt Status.
const STATUS: usize = 0x06;
const INTERRUPT_STATUS: u8 = 1 << 3;
const INTERRUPT_PIN: usize = 0x3d;

const POWER: usize = 0x40;
const EXPRESS: usize = 0x50;
const MSIX: usize = 0x90;
const MSI: usize = 0xb0;
/// Initiate Function Level Reset, in the Device Control register.
const INITIATE_FLR: u16 = 1 << 15;
const DEVICE_CONTROL: usize = EXPRESS + 8;
/// Enable No Snoop, in the Device Control register.
const NO_SNOOP: u16 = 1 << 11;

/// A vendor ID that PCI-SIG has not assigned, because no vendor makes this function.
pub(super) const VENDOR: u16 = 0xfffe;
const DEVICE: u16 = 0x0001;

use super::Options;
use super::register_file::Layout;

pub(super) struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
}

impl Config {
    /// The power-on state, except that memory decoding is on, as under VFIO.
    pub(super) fn new(layout: Layout, options: &Options) -> Self {
        let Layout { size: bar, table } = layout;
        let (vectors, no_snoop) = (options.vectors(), options.no_snoop);
        let mut this = Self { bytes: [0; SIZE], writable: [0; SIZE] };
        this.put16(0x00, VENDOR);
        this.put16(0x02, DEVICE);
        this.put16(COMMAND, MEMORY_SPACE);
        this.allow16(COMMAND, MEMORY_SPACE | BUS_MASTER | INTERRUPT_DISABLE);
        this.put16(0x06, 1 << 4); // Capabilities List
        this.put32(0x08, 0x0108_0201); // class code 01 08 02, revision 1
        this.put32(0x10, 0b100); // BAR 0: memory, 64 bits
        this.allow32(0x10, !(bar - 1));
        this.allow32(0x14, u32::MAX);
        this.put16(0x2c, VENDOR);
        this.put16(0x2e, DEVICE);
        this.put8(0x34, POWER);
        this.allow16(0x3c, 0x00ff); // Interrupt Line
        this.put8(INTERRUPT_PIN, options.intx.into()); // INTA#, or none

        this.capability(POWER, 0x01, EXPRESS);
        this.put16(POWER + 2, 0x0003); // version 3
        this.allow16(POWER + 4, 0b11); // PowerState

        let after_msi = if vectors != 0 { MSIX } else { 0 };
        this.capability(EXPRESS, 0x10, if options.msi != 0 { MSI } else { after_msi });
        this.put16(EXPRESS + 2, 0x0002); // version 2, endpoint
        this.put32(EXPRESS + 4, 1 << 28 | 1 << 15 | 1); // FLR, role-based errors, 256-byte payload
        this.allow16(DEVICE_CONTROL, 0x70ff | 1 << 8 | if no_snoop { NO_SNOOP } else { 0 });
        this.put16(DEVICE_CONTROL, if no_snoop { NO_SNOOP } else { 0 });
        this.put32(EXPRESS + 12, 0x0000_0411); // one lane, 2.5 GT/s
        this.put16(EXPRESS + 18, 0x0011);

        if options.msi != 0 {
            this.msi(options.msi, after_msi);
        }
        if vectors != 0 {
            this.msix(vectors, table);
        }
        this
    }

    /// PCI 3.0 §6.8.1: 64-bit addresses, no masking.
    fn msi(&mut self, vectors: u16, next: usize) {
        self.capability(MSI, 0x05, next);
        let count = u16::try_from(vectors.trailing_zeros()).expect("at most 5");
        self.put16(MSI + 2, 1 << 7 | count << 1);
        self.allow16(MSI + 2, 0b111 << 4 | 1); // Multiple Message Enable, MSI Enable
        self.allow32(MSI + 4, !0b11);
        self.allow32(MSI + 8, u32::MAX);
        self.allow16(MSI + 12, u16::MAX);
    }

    /// PCI 3.0 §6.8.2: a table of `vectors` entries at offset `table` of BAR 0.
    fn msix(&mut self, vectors: u16, table: u32) {
        self.capability(MSIX, 0x11, 0);
        self.put16(MSIX + 2, vectors - 1);
        self.allow16(MSIX + 2, 0xc000); // MSI-X Enable, Function Mask
        self.put32(MSIX + 4, table);
        self.put32(MSIX + 8, table + u32::from(vectors) * 16);
    }

    /// `line_asserted` is Interrupt Status.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8], line_asserted: bool) -> Option<()> {
        let range = offset..offset.checked_add(bytes.len())?;
        bytes.copy_from_slice(self.bytes.get(range.clone())?);
        if line_asserted && range.contains(&STATUS) {
            bytes[STATUS - offset] |= INTERRUPT_STATUS;
        }
        Some(())
    }

    /// Writes the writable bits. True if the write initiates a function level reset.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) -> Option<bool> {
        let range = offset..offset.checked_add(bytes.len())?;
        let masks = self.writable.get(range.clone())?;
        for ((old, mask), new) in self.bytes[range.clone()].iter_mut().zip(masks).zip(bytes) {
            *old = (*old & !mask) | (new & mask);
        }
        let high = DEVICE_CONTROL + 1;
        Some(range.contains(&high) && bytes[high - offset] & INITIATE_FLR.to_le_bytes()[1] != 0)
    }

    pub(super) fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// True if Enable No Snoop is set.
    pub(super) fn no_snoop(&self) -> bool {
        u16::from_le_bytes([self.bytes[DEVICE_CONTROL], self.bytes[DEVICE_CONTROL + 1]]) & NO_SNOOP != 0
    }

    pub(super) fn set_bus_master(&mut self, on: bool) {
        let others = self.command() & !BUS_MASTER;
        self.put16(COMMAND, if on { others | BUS_MASTER } else { others });
    }

    fn capability(&mut self, at: usize, id: u8, next: usize) {
        self.bytes[at] = id;
        self.put8(at + 1, next);
    }

    fn put8(&mut self, at: usize, value: usize) {
        self.bytes[at] = u8::try_from(value).expect("capabilities lie in the first 256 bytes");
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.writable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    fn allow32(&mut self, at: usize, mask: u32) {
        self.writable[at..at + 4].copy_from_slice(&mask.to_le_bytes());
    }
}
