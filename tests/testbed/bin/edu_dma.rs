//! Drives QEMU's educational device (docs/specs/edu.rst) from user space, as a guest's driver would. The device copies a page
//! of this process to its buffer and back to another page, or writes to a given physical address.
//!
//!   edu-dma copy           prints "copied" if the second page then has the content of the first
//!   edu-dma aim ADDRESS    makes the device write 64 bytes at a physical address; prints "finished" when it has finished

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

type Error = Box<dyn std::error::Error>;

const PAGE: usize = 4096;
/// Registers: source, destination, byte count, and command with its bits.
const SOURCE: usize = 0x80;
const DESTINATION: usize = 0x88;
const COUNT: usize = 0x90;
const COMMAND: usize = 0x98;
const START: u64 = 1;
const FROM_DEVICE: u64 = 1 << 1;
/// Address of the device's own buffer, in its address space.
const BUFFER: u64 = 0x4_0000;

struct Edu {
    registers: MmapRegion<()>,
}

impl Edu {
    fn open() -> Result<Self, Error> {
        let at = find()?;
        fs::write(at.join("enable"), "1")?;
        // Command register: memory space, bus master.
        File::options().write(true).open(at.join("config"))?.write_all_at(&[0b110], 4)?;
        let file = File::options().read(true).write(true).open(at.join("resource0"))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let registers = MmapRegion::build(Some(FileOffset::new(file, 0)), 1 << 20, protection, libc::MAP_SHARED)?;
        Ok(Self { registers })
    }

    /// Makes the device copy `count` bytes; returns when it has finished.
    fn copy(&self, source: u64, destination: u64, count: u64, direction: u64) -> Result<(), Error> {
        let slice = self.registers.as_volatile_slice();
        slice.store(source, SOURCE, SeqCst)?;
        slice.store(destination, DESTINATION, SeqCst)?;
        slice.store(count, COUNT, SeqCst)?;
        slice.store(START | direction, COMMAND, SeqCst)?;
        for _ in 0..500 {
            let command: u64 = slice.load(COMMAND, SeqCst)?;
            if command & START == 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("the device has not finished within 5 s".into())
    }
}

/// Vendor 1234, device 11e8.
fn find() -> Result<PathBuf, Error> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let at = entry?.path();
        if fs::read_to_string(at.join("device"))?.trim() == "0x11e8" {
            return Ok(at);
        }
    }
    Err("no educational device on this machine".into())
}

/// The physical address of `page` (Documentation/admin-guide/mm/pagemap.rst).
fn physical(page: &MmapRegion<()>) -> Result<u64, Error> {
    let mut entry = [0; 8];
    let index = page.as_ptr() as usize / PAGE;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, index as u64 * 8)?;
    let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
    if frame == 0 { Err("the page is not present".into()) } else { Ok(frame * PAGE as u64) }
}

fn copy() -> Result<(), Error> {
    let edu = Edu::open()?;
    let (from, to) = (MmapRegion::<()>::new(PAGE)?, MmapRegion::<()>::new(PAGE)?);
    let pattern: Vec<u8> = (0..251).cycle().take(PAGE).collect();
    from.as_volatile_slice().write_slice(&pattern, 0)?;
    to.as_volatile_slice().write_slice(&[0xff; PAGE], 0)?;
    edu.copy(physical(&from)?, BUFFER, PAGE as u64, 0)?;
    edu.copy(BUFFER, physical(&to)?, PAGE as u64, FROM_DEVICE)?;
    let mut found = vec![0; PAGE];
    to.as_volatile_slice().read_slice(&mut found, 0)?;
    if found != pattern {
        return Err("the copy differs".into());
    }
    println!("copied");
    Ok(())
}

fn main() -> Result<(), Error> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["copy"] => copy(),
        ["aim", address] => {
            let address = u64::from_str_radix(address.trim_start_matches("0x"), 16)?;
            Edu::open()?.copy(BUFFER, address, 64, FROM_DEVICE)?;
            println!("finished");
            Ok(())
        }
        _ => Err("usage: edu-dma copy | edu-dma aim ADDRESS".into()),
    }
}
