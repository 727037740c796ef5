//! Configuration space of a function that fails in the middle of an access, or loses its capabilities.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use super::*;
use crate::hardware::{InterruptKind, Registers};

/// Where the PCI Express capability is, and the high byte of its Device Control.
const EXPRESS: u8 = 0x40;
const DEVICE_CONTROL_HIGH: usize = 0x49;
/// A register without a meaning here.
const OTHER: u16 = 0x60;
const STATUS: usize = 0x06;
const CAPABILITIES_LIST: u8 = 1 << 4;

struct Failing {
    bytes: Mutex<[u8; 256]>,
    /// The next write arrives, resets the function, and is reported as failed.
    fail_write: AtomicBool,
    /// Device Control cannot be read.
    fail_read: AtomicBool,
}

impl Failing {
    fn new() -> Self {
        let mut bytes = [0; 256];
        bytes[STATUS] = CAPABILITIES_LIST;
        bytes[0x34] = EXPRESS;
        bytes[usize::from(EXPRESS)] = 0x10;
        Self { bytes: Mutex::new(bytes), fail_write: AtomicBool::default(), fail_read: AtomicBool::default() }
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.lock().unwrap()[at]
    }

    fn set(&self, at: usize, value: u8) {
        self.bytes.lock().unwrap()[at] = value;
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Function for Failing {
    fn name(&self) -> &str {
        "failing"
    }
    fn config_read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        let (from, to) = (usize::from(offset), usize::from(offset) + bytes.len());
        if (from..to).contains(&DEVICE_CONTROL_HIGH) && self.fail_read.load(SeqCst) {
            return Err(eio());
        }
        bytes.copy_from_slice(&self.bytes.lock().unwrap()[from..to]);
        Ok(())
    }
    fn config_write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        let from = usize::from(offset);
        self.bytes.lock().unwrap()[from..from + bytes.len()].copy_from_slice(bytes);
        if self.fail_write.swap(false, SeqCst) {
            self.set(DEVICE_CONTROL_HIGH, NO_SNOOP_HIGH);
            return Err(eio());
        }
        Ok(())
    }
    fn registers(&self, _bar: u8) -> io::Result<Arc<dyn Registers>> {
        unreachable!("no BAR")
    }
    fn vectors(&self, _kind: InterruptKind) -> u16 {
        unreachable!("no interrupts")
    }
    fn route_vectors(&self, _kind: InterruptKind, _events: &[BorrowedFd<'_>]) -> io::Result<()> {
        unreachable!("no interrupts")
    }
    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.set(usize::from(COMMAND), if on { BUS_MASTER } else { 0 });
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        unreachable!("no reset")
    }
}

#[test]
fn the_bit_is_cleared_after_a_write_that_fails() {
    let function = Failing::new();
    let config = ConfigSpace::new(&function, true).unwrap();
    function.fail_write.store(true, SeqCst);

    let error = config.write(OTHER, &mut [1]).unwrap_err();

    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("write configuration space"), "{error}");
    assert_eq!(function.byte(DEVICE_CONTROL_HIGH), 0);
}

#[test]
fn bus_master_is_off_when_the_bit_cannot_be_read() {
    let function = Failing::new();
    let config = ConfigSpace::new(&function, true).unwrap();
    config.write(COMMAND, &mut [BUS_MASTER]).unwrap();
    function.fail_read.store(true, SeqCst);

    let error = config.write(OTHER, &mut [1]).unwrap_err();

    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert_eq!(function.byte(usize::from(COMMAND)), 0);
}

#[test]
fn a_bit_that_must_be_masked_and_is_not_found_is_an_error() {
    let function = Failing::new();
    function.set(STATUS, 0);

    let masked = ConfigSpace::new(&function, true);
    let unmasked = ConfigSpace::new(&function, false);

    let error = masked.map(drop).unwrap_err();
    assert!(matches!(error, PassthroughError::NoDeviceControl(_)), "{error}");
    assert!(unmasked.is_ok());
}
