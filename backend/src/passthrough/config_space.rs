//! Configuration space as the guest sees it: the function's own, as VFIO virtualises it (BARs, resets, what a guest must not
//! set), with one thing taken out. VFIO passes Device Control on as it is, so a guest could set Enable No Snoop. Where the
//! verdict is that the bit is held off, it reads 0 here, writes to it are dropped, and the function is asked after each
//! write and each reset whether it has stayed 0: a reset by any path (Function Level Reset, power state) may give it back.
//!
//! A function that does not obey gets no bus master: its memory was mapped for a function whose DMA is coherent.

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
    /// Where the high byte of Device Control is, if Enable No Snoop is held off.
    held: Option<u16>,
}

impl<'d> ConfigSpace<'d> {
    /// Configuration space of `function`, with Enable No Snoop held off if `hold_off`.
    pub(super) fn new(function: &'d dyn Function, hold_off: bool) -> Result<Self, PassthroughError> {
        let at = no_snoop::device_control(function);
        let at = at.map_err(PassthroughError::function(function, "look for the PCI Express capability"))?;
        Ok(Self { function, held: at.filter(|_| hold_off).map(|at| at + 1) })
    }

    /// Reads `bytes.len()` bytes from `offset`.
    pub(crate) fn read(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PassthroughError> {
        let read = self.function.config_read(offset, bytes);
        read.map_err(PassthroughError::function(self.function, "read configuration space"))?;
        if let Some(byte) = self.held_byte(offset, bytes) {
            *byte &= !NO_SNOOP_HIGH;
        }
        Ok(())
    }

    /// Writes `bytes` from `offset` on.
    pub(crate) fn write(&self, offset: u16, bytes: &mut [u8]) -> Result<(), PassthroughError> {
        if let Some(byte) = self.held_byte(offset, bytes) {
            *byte &= !NO_SNOOP_HIGH;
        }
        if sets_bus_master(offset, bytes) {
            self.verify()?;
        }
        let written = self.function.config_write(offset, bytes);
        written.map_err(PassthroughError::function(self.function, "write configuration space"))?;
        self.verify()
    }

    /// Looks whether Enable No Snoop is off where it is held off, and clears it where not.
    ///
    /// # Errors
    /// It does not stay clear; bus master is off then.
    pub(super) fn verify(&self) -> Result<(), PassthroughError> {
        let Some(at) = self.held else { return Ok(()) };
        let step = |what| PassthroughError::function(self.function, what);
        let mut high = [0];
        self.function.config_read(at, &mut high).map_err(step("read Device Control"))?;
        if high[0] & NO_SNOOP_HIGH == 0 {
            return Ok(());
        }
        if no_snoop::hold_off(self.function).map_err(step("clear Enable No Snoop"))? {
            return Ok(());
        }
        self.function.set_bus_master(false).map_err(step("bus master off"))?;
        Err(PassthroughError::NoSnoop(self.function.name().to_owned()))
    }

    /// The byte of `bytes`, which lie at `offset`, that holds the bit.
    fn held_byte<'b>(&self, offset: u16, bytes: &'b mut [u8]) -> Option<&'b mut u8> {
        bytes.get_mut(usize::from(self.held?.checked_sub(offset)?))
    }
}

/// True if `bytes`, written at `offset`, turn bus master on.
fn sets_bus_master(offset: u16, bytes: &[u8]) -> bool {
    let byte = COMMAND.checked_sub(offset).and_then(|at| bytes.get(usize::from(at)));
    byte.is_some_and(|byte| byte & BUS_MASTER != 0)
}
