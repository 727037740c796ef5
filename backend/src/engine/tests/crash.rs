//! A process that ends with requests in flight, and the next one on the same guest memory and the same inflight regions. The
//! end is a copy of both, made while the device holds its commands.

use std::fs::File;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::disk::{DiskOptions, FakeDisk};
use super::rig::*;
use crate::driver::Command;
use crate::engine::{InflightRegion, Layout, VringSetup};
use crate::memory::map_shared_file;
use crate::sys::SharedMemory;

const SIZE: u16 = 64;

/// A new inflight region, and its memory.
fn inflight(layout: Layout) -> (InflightRegion, SharedMemory) {
    let len = InflightRegion::bytes(layout, SIZE) as u64;
    let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    let memory = map_shared_file(file, 0, len).unwrap();
    (InflightRegion::new(memory.clone(), layout, SIZE).unwrap(), memory)
}

fn copy(from: &SharedMemory, to: &SharedMemory) {
    from.copy_to_shared(0, to, 0, from.len());
}

/// A process that serves one ring.
struct Process {
    rig: Rig,
    record: SharedMemory,
}

impl Process {
    /// The first process, and its guest.
    fn first(disk: DiskOptions) -> (Self, SplitDriver) {
        let rig = Rig::new(disk);
        let (driver, setup) = rig.stopped_driver(0, RingOptions::default());
        let (region, record) = inflight(Layout::Split);
        let process = Self { rig, record };
        process.start(VringSetup { inflight: Some(region), ..setup });
        (process, driver)
    }

    fn start(&self, setup: VringSetup) {
        self.rig.engine.start_ring(setup).unwrap();
        self.rig.engine.set_enabled(0, true);
    }

    /// The next process, with the guest's memory and the record as they are now. Its device holds commands.
    fn successor(&self, disk: DiskOptions, driver: &mut SplitDriver) -> (Self, VringSetup) {
        let rig = Rig::new(disk);
        rig.disk.hold();
        copy(self.rig.region.memory(), rig.region.memory());
        let (region, record) = inflight(Layout::Split);
        copy(&self.record, &record);
        // It ends here. Its guest memory is no longer looked at, and it must not take the guest's kicks.
        self.rig.disk.resume();
        self.rig.engine.stop_ring(0).unwrap();
        driver.memory = rig.region.memory().clone();
        // As QEMU sets it after a disconnect.
        let setup = VringSetup { inflight: Some(region), ..driver.setup(driver.used_idx()) };
        (Self { rig, record }, setup)
    }
}

/// The first blocks of the commands that the disk holds.
fn held(disk: &FakeDisk) -> Vec<u64> {
    let block = |command: &Command| match command {
        Command::Read { block, .. } | Command::Write { block, .. } => *block,
        other => panic!("{other:?}"),
    };
    disk.held().iter().map(|held| block(&held.command)).collect()
}

/// A process with requests for sectors 0 to 5, of which 3 and 1 have been completed in this order, and its guest.
fn with_four_in_flight() -> (Process, SplitDriver) {
    let (process, mut driver) = Process::first(DiskOptions::default());
    process.rig.disk.hold();
    for sector in 0..6 {
        driver.request(OUT, sector, &[(DATA + 512 * sector, 512)]);
    }
    driver.kick();
    wait_until("six commands", || process.rig.disk.held().len() == 6);
    for index in [3, 1] {
        process.rig.disk.complete(index);
        driver.wait(1);
    }
    assert_eq!(held(&process.rig.disk), [0, 2, 4, 5]);
    (process, driver)
}

#[test]
fn the_next_process_submits_what_was_in_flight_in_its_order_and_nothing_that_was_published() {
    let (process, mut driver) = with_four_in_flight();

    let (next, setup) = process.successor(DiskOptions::default(), &mut driver);
    let sent = driver.request(IN, 9, &[(DATA, 512)]);
    next.start(setup);
    wait_until("five commands", || next.rig.disk.held().len() >= 5);

    assert_eq!(held(&next.rig.disk), [0, 2, 4, 5, 9]);
    next.rig.disk.resume();
    let used = driver.wait(5);
    assert_eq!(driver.status(sent), 0);
    let mut heads: Vec<_> = used.iter().map(|&(head, _)| head).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 6, 12, 15, 18]);
    assert_eq!(next.rig.engine.statistics().resubmitted, 4);
}

#[test]
fn a_device_queue_that_is_too_short_delays_what_was_in_flight() {
    let (process, mut driver) = with_four_in_flight();

    let (next, setup) = process.successor(DiskOptions { depth: 2, ..DiskOptions::default() }, &mut driver);
    driver.request(IN, 9, &[(DATA, 512)]);
    next.start(setup);

    let mut order = Vec::new();
    while order.len() < 5 {
        wait_until("a command", || !next.rig.disk.held().is_empty());
        order.push(held(&next.rig.disk)[0]);
        next.rig.disk.complete(0);
    }
    assert_eq!(order, [0, 2, 4, 5, 9]);
    driver.wait(5);
}

#[test]
fn a_process_that_ends_during_the_recovery_loses_nothing() {
    let (process, mut driver) = with_four_in_flight();
    let shallow = DiskOptions { depth: 2, ..DiskOptions::default() };
    let (second, setup) = process.successor(shallow, &mut driver);
    second.start(setup);
    wait_until("two commands", || second.rig.disk.held().len() == 2);
    second.rig.disk.complete(1);
    driver.wait(1);
    wait_until("two commands", || second.rig.disk.held().len() == 2);

    let (third, setup) = second.successor(DiskOptions::default(), &mut driver);
    third.start(setup);
    wait_until("three commands", || third.rig.disk.held().len() >= 3);

    assert_eq!(held(&third.rig.disk), [0, 4, 5]);
    third.rig.disk.resume();
    driver.wait(3);
}

#[test]
fn a_stop_during_the_recovery_waits_for_all_of_it_and_leaves_no_mark() {
    let (process, mut driver) = with_four_in_flight();
    let (next, setup) = process.successor(DiskOptions { depth: 1, ..DiskOptions::default() }, &mut driver);
    next.start(setup);
    wait_until("a command", || !next.rig.disk.held().is_empty());

    next.rig.disk.resume();
    let base = next.rig.engine.stop_ring(0).unwrap();

    assert_eq!(base, Some(6));
    assert_eq!(driver.wait(4).len(), 4);
    let (last, setup) = next.successor(DiskOptions::default(), &mut driver);
    last.start(setup);
    driver.send(IN, 9, &[(DATA, 512)]);
    wait_until("a command", || !last.rig.disk.held().is_empty());
    assert_eq!(held(&last.rig.disk), [9]);
    last.rig.disk.resume();
    driver.wait(1);
}

#[test]
fn a_record_that_contradicts_the_ring_fails_the_ring() {
    let (process, mut driver) = with_four_in_flight();
    let (next, setup) = process.successor(DiskOptions::default(), &mut driver);
    // used_idx, after 16-bit version, number of entries and head of the last batch.
    next.record.write_u16(14, driver.used_idx().wrapping_add(1));

    next.start(setup);

    assert!(wait_readable(&driver.err, Duration::from_secs(20)), "err was not signalled");
    driver.send(IN, 9, &[(DATA, 512)]);
    assert_eq!(next.rig.engine.stop_ring(0).unwrap(), Some(2));
    assert!(next.rig.disk.held().is_empty());
    assert!(driver.used().is_empty());
}

#[test]
fn a_chain_that_has_become_nonsense_completes_with_an_error() {
    let (process, mut driver) = with_four_in_flight();
    let (next, setup) = process.successor(DiskOptions::default(), &mut driver);
    // The head of sector 2's chain now links to a descriptor that does not exist.
    let table = setup.desc.start().0;
    driver.write_desc(table, 6, Desc { addr: DATA, len: 16, flags: NEXT, next: SIZE });

    next.start(setup);
    wait_until("three commands", || next.rig.disk.held().len() == 3);
    next.rig.disk.resume();

    let used = driver.wait(4);
    assert!(used.contains(&(6, 0)), "{used:?}");
}
