//! The Enable No Snoop bit of a function: whether it can be changed, and keeping it clear.
//!
//! A bit that reads zero need not be hardwired: firmware or a host driver may have cleared it, and a reset sets it again. So
//! the bit is *probed* (set and read back, cleared and read back, restored) while bus master is off and the function cannot
//! do DMA.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::coherency::{Coherent, NoSnoop, NotOurs, Verdict};
use crate::hardware::{Function, InterruptKind, Registers};

/// Vendor ID @ 0x00 : u16 (PCI Local Bus 3.0 §6.2.1).
const VENDOR: u16 = 0x00;
/// Command @ 0x04 : u16; bit 2 is Bus Master Enable.
const COMMAND: u16 = 0x04;
/// Status @ 0x06 : u16; bit 4 is Capabilities List.
const STATUS: u16 = 0x06;
/// Class code, base class @ 0x0b : u8; 3 is a display controller.
const BASE_CLASS: u16 = 0x0b;
/// Capabilities pointer @ 0x34 : u8.
const CAPABILITIES: u16 = 0x34;
/// Interrupt pin @ 0x3d : u8; 0 is none (PCI Local Bus 3.0 §6.2.4).
const INTERRUPT_PIN: u16 = 0x3d;
/// PCI Express capability id (PCIe 6.0 §7.5.3.1).
const EXPRESS: u8 = 0x10;
/// Offset of Device Control in that capability (PCIe 6.0 §7.5.3.4).
const DEVICE_CONTROL: u16 = 8;
/// Enable No Snoop, in Device Control.
const ENABLE_NO_SNOOP: u16 = 1 << 11;
const INTEL: u16 = 0x8086;
const STAYS_SET: &str = "its Enable No Snoop bit reads 1 after it was cleared; use --no-snoop=assume to flush instead";

/// Probes the function's Enable No Snoop bit. `virtual_function`: whether it is a virtual function, according to sysfs; `None` if
/// sysfs does not tell. The bit of a virtual function reads zero, whatever the one of its physical function is (PCIe 6.0 §9.3.5.4).
/// So a zero of a function that may be one proves nothing.
///
/// # Errors
/// The errno of the configuration access that failed; [`io::ErrorKind::ResourceBusy`] if bus master is on.
pub fn probe(function: &dyn Function, virtual_function: Option<bool>) -> io::Result<NoSnoop> {
    if virtual_function == Some(true) {
        return Ok(NoSnoop::NotOurs(NotOurs::VirtualFunction));
    }
    if word(function, VENDOR)? == INTEL && byte(function, BASE_CLASS)? == 0x03 {
        return Ok(NoSnoop::NotOurs(NotOurs::IntegratedGraphics));
    }
    let Some(capability) = express(function)? else { return Ok(NoSnoop::NotOurs(NotOurs::NoCapability)) };
    if word(function, COMMAND)? & (1 << 2) != 0 {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    let control = word(function, capability + DEVICE_CONTROL)?;
    set_word(function, capability + DEVICE_CONTROL, control | ENABLE_NO_SNOOP)?;
    let set = word(function, capability + DEVICE_CONTROL)? & ENABLE_NO_SNOOP != 0;
    let cleared = disable(function)?;
    set_word(function, capability + DEVICE_CONTROL, control)?;
    // Virtual functions have no interrupt pin (PCIe 6.0 §9.3.4.1.18), and VFIO shows none.
    let may_be_virtual = virtual_function.is_none() && byte(function, INTERRUPT_PIN)? == 0;
    Ok(match (set, cleared) {
        (_, false) => NoSnoop::NotOurs(NotOurs::StaysSet),
        (true, true) => NoSnoop::Controllable,
        (false, true) if may_be_virtual => NoSnoop::NotOurs(NotOurs::MaybeVirtualFunction),
        (false, true) => NoSnoop::NeverSet,
    })
}

/// Clears the bit and reads it back; false if it still reads 1.
///
/// # Errors
/// The errno of the configuration access that failed.
pub fn disable(function: &dyn Function) -> io::Result<bool> {
    let Some(capability) = express(function)? else { return Ok(false) };
    let control = word(function, capability + DEVICE_CONTROL)?;
    set_word(function, capability + DEVICE_CONTROL, control & !ENABLE_NO_SNOOP)?;
    Ok(word(function, capability + DEVICE_CONTROL)? & ENABLE_NO_SNOOP == 0)
}

/// Offset of Device Control in configuration space, in bytes; `None` for a function without a PCI Express capability.
///
/// # Errors
/// The errno of the configuration access that failed.
pub fn device_control(function: &dyn Function) -> io::Result<Option<u16>> {
    Ok(express(function)?.map(|capability| capability + DEVICE_CONTROL))
}

/// Keeps the bit of `function` clear, if that is the verdict.
///
/// # Errors
/// The errno of the configuration access that failed, or that the bit does not stay clear and what to do then.
pub fn apply(function: Arc<dyn Function>, verdict: Verdict) -> io::Result<Arc<dyn Function>> {
    if !matches!(verdict, Verdict::Coherent(Coherent::Disabled { .. })) {
        return Ok(function);
    }
    match NoSnoopDisabled::new(function)? {
        Some(function) => Ok(Arc::new(function)),
        None => Err(io::Error::other(STAYS_SET)),
    }
}

/// A function whose bit is kept clear: it is cleared, and read back, after each reset, which may set it, and each time before
/// bus master is turned on. If the bit does not stay clear, bus master is refused: memory was mapped for a function whose DMA
/// is coherent.
pub struct NoSnoopDisabled(Arc<dyn Function>);

impl NoSnoopDisabled {
    /// Clears the bit of `function`; `None` if it does not stay clear.
    ///
    /// # Errors
    /// The errno of the configuration access that failed.
    pub fn new(function: Arc<dyn Function>) -> io::Result<Option<Self>> {
        Ok(disable(&*function)?.then_some(Self(function)))
    }

    fn ensure_clear(&self) -> io::Result<()> {
        if disable(&*self.0)? {
            return Ok(());
        }
        log::error!("{}: DMA is no longer coherent: {STAYS_SET}", self.0.name());
        Err(io::Error::other(STAYS_SET))
    }
}

impl Function for NoSnoopDisabled {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        self.0.config_read(offset, bytes)
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.0.config_write(offset, bytes)
    }
    fn registers(&self, bar: u8) -> io::Result<Arc<dyn Registers>> {
        self.0.registers(bar)
    }
    fn vectors(&self, kind: InterruptKind) -> u16 {
        self.0.vectors(kind)
    }
    fn route_vectors(&self, kind: InterruptKind, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.route_vectors(kind, events)
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.0.unmask_intx()
    }
    fn interrupt_wanted(&self, vector: u16) -> Option<Arc<AtomicBool>> {
        self.0.interrupt_wanted(vector)
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        if on {
            self.ensure_clear()?;
        }
        self.0.set_bus_master(on)
    }
    fn route_removal(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        self.0.route_removal(event)
    }
    fn reset(&self) -> io::Result<()> {
        self.0.reset()?;
        self.ensure_clear()
    }
}

/// Offset of the PCI Express capability. The walk ends after 48 entries, the most that fit, in case the list is circular.
fn express(function: &dyn Function) -> io::Result<Option<u16>> {
    if word(function, STATUS)? & (1 << 4) == 0 {
        return Ok(None);
    }
    let mut at = byte(function, CAPABILITIES)?;
    for _ in 0..48 {
        let entry = u16::from(at & !3);
        if entry < 0x40 {
            return Ok(None);
        }
        if byte(function, entry)? == EXPRESS {
            return Ok(Some(entry));
        }
        at = byte(function, entry + 1)?;
    }
    Ok(None)
}

fn byte(function: &dyn Function, offset: u16) -> io::Result<u8> {
    let mut bytes = [0];
    function.config_read(offset, &mut bytes)?;
    Ok(bytes[0])
}

fn word(function: &dyn Function, offset: u16) -> io::Result<u16> {
    let mut bytes = [0; 2];
    function.config_read(offset, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

fn set_word(function: &dyn Function, offset: u16, value: u16) -> io::Result<()> {
    function.config_write(offset, &value.to_le_bytes())
}
