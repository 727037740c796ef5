//! Configuration space as the guest sees it: VFIO's virtualized one (BARs, resets, bits that a guest must not set), except for
//! one bit. VFIO passes Device Control through, so a guest could set Enable No Snoop. If the verdict requires the bit to be
//! clear, it reads 0 here and writes to it are dropped. It is read back after each write and each reset, because any
//! reset (Function Level Reset, power state) may set it.
//!
//! If the bit does not stay clear, or cannot be read, bus master is turned off: memory was mapped for a function whose DMA is
//! coherent.

use std::io;

use crate::hardware::Function;
use crate::vfio::no_snoop;

use super::PassthroughError;

/// Command @ 0x04 : u16 (PCI Local Bus 3.0 §6.2.2), its low byte; bit 2 is Bus Master Enable.
const COMMAND: u16 = 0x04;
const BUS_MASTER: u8 = 1 << 2;
/// Enable No Snoop is bit 11 of Device Control (PCIe 6.0 §7.5.3.4): bit 3 of its high byte.
const NO_SNOOP_HIGH: u8 = 1 << 3;

/// See the top of this file.
pub(crate) struct ConfigSpace<'d> {
    function: &'d dyn Function,
    /// Offset of the high byte of Device Control, if Enable No Snoop must be masked.
    masked_at: Option<u16>,
}

impl<'d> ConfigSpace<'d> {
    /// Configuration space of `function`, with Enable No Snoop masked if it must be `no_snoop_clear`.
    ///
    /// # Errors
    /// The errno of a configuration access; [`PassthroughError::NoDeviceControl`] if there is nothing to mask.
    pub(super) fn new(function: &'d dyn Function, no_snoop_clear: bool) -> Result<Self, PassthroughError> {
        let at = no_snoop::device_control(function);
        let at = at.map_err(PassthroughError::function(function, "find the PCI Express capability"))?;
        if no_snoop_clear && at.is_none() {
            return Err(PassthroughError::NoDeviceControl(function.name().to_owned()));
        }
        Ok(Self { function, masked_at: at.filter(|_| no_snoop_clear).map(|at| at + 1) })
    }

    /// Reads `bytes.len()` bytes from `offset` on.
    pub(crate) fn read(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PassthroughError> {
        let read = self.function.config_read(offset, bytes);
        read.map_err(PassthroughError::function(self.function, "read configuration space"))?;
        if let Some(byte) = self.masked_byte(offset, bytes) {
            *byte &= !NO_SNOOP_HIGH;
        }
        Ok(())
    }

    /// Writes `bytes` from `offset` on.
    pub(crate) fn write(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PassthroughError> {
        if let Some(byte) = self.masked_byte(offset, bytes) {
            *byte &= !NO_SNOOP_HIGH;
        }
        if sets_bus_master(offset, bytes) {
            self.verify()?;
        }
        let written = self.function.config_write(offset, bytes);
        // `and`: verified after a failure as well. Part of the write may have arrived, and may have reset the function.
        written.map_err(PassthroughError::function(self.function, "write configuration space")).and(self.verify())
    }

    /// Checks that a masked Enable No Snoop is clear, and clears it if not.
    ///
    /// # Errors
    /// [`PassthroughError::NoSnoop`] if it does not stay clear, or the errno of the access that failed. Bus master is off then.
    pub(super) fn verify(&self) -> Result<(), PassthroughError> {
        let Some(at) = self.masked_at else { return Ok(()) };
        let error = |step| PassthroughError::function(self.function, step);
        let clear = self.ensure_clear(at);
        if matches!(clear, Ok(true)) {
            return Ok(());
        }
        self.function.set_bus_master(false).map_err(error("bus master off"))?;
        clear.map_err(error("clear Enable No Snoop"))?;
        Err(PassthroughError::NoSnoop(self.function.name().to_owned()))
    }

    /// Clears Enable No Snoop, bit 3 of the byte `at`, if it is set; false if it stays set.
    fn ensure_clear(&self, at: u16) -> io::Result<bool> {
        let mut high = [0];
        self.function.config_read(at, &mut high)?;
        if high[0] & NO_SNOOP_HIGH == 0 { Ok(true) } else { no_snoop::disable(self.function) }
    }

    /// The byte with the masked bit, if it is among `bytes`, which start at `offset`.
    fn masked_byte<'b>(&self, offset: u16, bytes: &'b mut [u8]) -> Option<&'b mut u8> {
        bytes.get_mut(usize::from(self.masked_at?.checked_sub(offset)?))
    }
}

/// True if writing `bytes` at `offset` turns bus master on.
fn sets_bus_master(offset: u16, bytes: &[u8]) -> bool {
    let byte = COMMAND.checked_sub(offset).and_then(|at| bytes.get(usize::from(at)));
    byte.is_some_and(|byte| byte & BUS_MASTER != 0)
}

#[cfg(test)]
mod tests;
