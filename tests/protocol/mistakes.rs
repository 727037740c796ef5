//! Mistakes on QEMU's command line. QEMU reports at most "Input/output error", so each must have one line in the server's
//! log that tells what is wrong and what to change.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, Once};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion};

use crate::requests::{BLK_IN, put, wait_for};
use crate::rig::{Rig, memory};
use crate::rings::{RAM, addresses, ring_events, running, send_all, setup_messages};
use crate::wire::{FEATURES, MemoryRegion, request::*, state, words};

const PAGE: u64 = 4096;

/// All log lines of this process, from all tests.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

pub(crate) fn capture_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&LINES).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
    });
}

/// The number of lines that contain all `parts`.
pub(crate) fn logged_lines(parts: &[&str]) -> usize {
    LINES.0.lock().unwrap().iter().filter(|line| parts.iter().all(|part| line.contains(part))).count()
}

/// Fails unless a line contains all `parts`.
fn assert_logged(parts: &[&str]) {
    let lines = LINES.0.lock().unwrap();
    let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line with {parts:?} in {lines:#?}");
}

#[test]
fn no_memory() {
    capture_log();
    let rig = Rig::new();
    let (wire, events) = (rig.connect(), ring_events());
    wire.negotiate();
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1);
    assert_logged(&[
        "virtqueue 0 cannot start",
        "shared no memory",
        "memory-backend-memfd",
        "share=on",
        "memory-backend=mem",
    ]);
}

#[test]
fn private_memory() {
    capture_log();
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", RAM.len));
    wire.negotiate();
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping = MmapRegion::<()>::build(Some(offset), 1 << 20, access, libc::MAP_PRIVATE).unwrap();
    let region = MemoryRegion { gpa: 0x77_0000_0000, qva: mapping.as_ptr() as u64, ..RAM };
    assert_eq!(wire.add_region(region, file.as_fd()), 1);
    assert_logged(&["0x7700000000", "mapped this memory privately", "share=on"]);
}

#[test]
fn a_ring_in_memory_that_is_not_shared() {
    capture_log();
    let rig = Rig::new();
    let (wire, _ram, _events) = running(&rig);
    let hole = 0x1234_5678_0000;
    assert_eq!(wire.call(SET_VRING_NUM, &state(1, 8), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ADDR, &addresses(1, hole, hole, hole), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(1, 1), &[]), 0);
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[1 | 0x100]), &[]), 1);
    assert_logged(&[
        "virtqueue 1 cannot start",
        "0x123456780000",
        "shared: 0x100000+1M",
        "each NUMA node and DIMM",
        "share=on",
    ]);
}

#[test]
fn a_dimm_that_is_not_shared() {
    capture_log();
    let rig = Rig::new();
    let (_wire, ram, events) = running(&rig);
    put(&ram, BLK_IN, 0);
    // The data buffer is in a DIMM that has not been shared.
    ram.write_all_at(&0x99_0000_0000_u64.to_le_bytes(), crate::rings::DESC + 16).unwrap();
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);
    assert_logged(&["virtqueue 0: request refused", "0x9900000000", "shared is 0x100000+1M", "DIMM", "share=on"]);
}

#[test]
fn a_limit_on_locked_memory() {
    capture_log();
    let rig = Rig::new();
    let (wire, ram) = (rig.connect(), memory("ram", RAM.len));
    wire.negotiate();
    rig.fail_after(0);
    assert_eq!(wire.add_region(MemoryRegion { gpa: 0x55_0000_0000, ..RAM }, ram.as_fd()), 1);
    assert_logged(&["0x5500000000", "2048 KiB must be locked", "64 KiB", "ulimit -l", "LimitMEMLOCK=", "CAP_IPC_LOCK"]);
}

#[test]
fn a_virtual_iommu() {
    capture_log();
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES | 1 << 33]), &[]), 1);
    assert_logged(&["ACCESS_PLATFORM", "not offered", "iommu_platform=on"]);
}

#[test]
fn too_many_queues() {
    capture_log();
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.call(SET_VRING_NUM, &state(77, 8), &[]), 1);
    assert_logged(&["virtqueue 77 does not exist", "num-queues=4"]);
}

#[test]
fn a_ring_too_large() {
    capture_log();
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.call(SET_VRING_NUM, &state(2, 4096), &[]), 1);
    assert_logged(&["virtqueue 2", "a power of two from 1 to 1024, not 4096", "queue-size"]);
}

#[test]
fn each_invalid_region_has_one_line_that_names_it() {
    capture_log();
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 2 * PAGE));
    wire.negotiate();
    let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let sealed = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&sealed, PAGE).unwrap();
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let at = |gpa| MemoryRegion { gpa, len: PAGE, qva: gpa, offset: 0 };
    assert_eq!(wire.add_region(at(0x66_0000_0000), file.as_fd()), 0);
    let refused = [
        (MemoryRegion { len: 0, ..at(0x66_0100_0000) }, file.as_fd(), ["0x6601000000 of 0 bytes", "empty"]),
        (
            MemoryRegion { offset: 2 * PAGE, ..at(0x66_0200_0000) },
            file.as_fd(),
            ["0x6602000000+4K", "file, which has 8192"],
        ),
        (at(0x66_0300_0008), file.as_fd(), ["0x6603000008+4K", "not aligned to its page size of 4K"]),
        (MemoryRegion { len: 2 * PAGE, ..at(0x65_ffff_f000) }, file.as_fd(), ["0x65fffff000+8K", "overlaps"]),
        (at(0x4_0066_0000_0000), file.as_fd(), ["0x4006600000000+4K", "outside the ranges this IOMMU allows"]),
        (at(0x66_0400_0000), wire.socket.as_fd(), ["0x6604000000+4K", "not of a file in memory"]),
        (at(0x66_0500_0000), read_only.as_fd(), ["0x6605000000+4K", "mmap: Permission denied"]),
        (at(0x66_0600_0000), sealed.as_fd(), ["0x6606000000+4K", "mmap: Operation not permitted"]),
    ];
    for (region, fd, parts) in refused {
        assert_eq!(wire.add_region(region, fd), 1, "{parts:?}");
        assert_eq!(logged_lines(&parts), 1, "{parts:?}");
    }
    assert_eq!(wire.remove_region(at(0x66_0700_0000)), 1);
    assert_eq!(logged_lines(&["0x6607000000+4K", "no such region", "0x6600000000+4K"]), 1);
}

#[test]
fn a_descriptor_of_another_kind() {
    capture_log();
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let region = MemoryRegion { gpa: 0, len: PAGE, qva: 0, offset: 0 };
    assert_eq!(wire.add_region(region, pipe.as_fd()), 1);
    assert_logged(&["request ADD_MEM_REG", "pipe:[", "not of a file in memory"]);
}
