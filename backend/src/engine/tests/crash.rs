//! A process that ends with requests in flight, and the next one on the same guest memory and the same inflight regions. The
//! end is a copy of both, made while the device holds its commands.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::disk::DiskOptions;
use super::packed_driver::PackedDriver;
use super::rig::*;
use super::zoned::offer_append;
use crate::driver::{Command, Geometry, ZoneGeometry};
use crate::engine::{InflightRegion, Layout, VringSetup};
use crate::memory::map_shared_file;
use crate::sys::SharedMemory;

const SIZE: u16 = 64;

pub(super) const BOTH: [Layout; 2] = [Layout::Split, Layout::Packed];

/// A new inflight region, and its memory.
pub(super) fn inflight(layout: Layout) -> (InflightRegion, SharedMemory) {
    let len = InflightRegion::bytes(layout, SIZE) as u64;
    let file = File::from(memfd_create("inflight", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    let memory = map_shared_file(file, 0, len).unwrap();
    (InflightRegion::new(memory.clone(), layout, SIZE).unwrap(), memory)
}

pub(super) fn copy(from: &SharedMemory, to: &SharedMemory) {
    from.copy_to_shared(0, to, 0, from.len());
}

/// A guest with one ring.
pub(super) enum Guest {
    Split(SplitDriver),
    Packed(PackedDriver),
}

impl Guest {
    fn new(rig: &Rig, layout: Layout) -> (Self, VringSetup) {
        let memory = rig.region.memory().clone();
        match layout {
            Layout::Split => {
                let (driver, setup) = SplitDriver::new(memory, 0, RingOptions::default());
                (Self::Split(driver), setup)
            }
            Layout::Packed => {
                let (driver, setup) = PackedDriver::new(memory, 0, RingOptions::default());
                (Self::Packed(driver), setup)
            }
        }
    }

    pub(super) fn layout(&self) -> Layout {
        if matches!(self, Self::Split(_)) { Layout::Split } else { Layout::Packed }
    }

    /// The driver of the split ring, or what both drivers have in common.
    pub(super) fn driver(&mut self) -> &mut SplitDriver {
        match self {
            Self::Split(driver) => driver,
            Self::Packed(driver) => &mut driver.guest,
        }
    }

    /// The parameters for the next process, as QEMU sets them after a disconnect: the base is the used index, or for a packed
    /// ring that of the last start.
    pub(super) fn setup(&mut self) -> VringSetup {
        let layout = self.layout();
        let used = if layout == Layout::Split { self.driver().used_idx() } else { 0 };
        let setup = self.driver().setup(used);
        let base = if layout == Layout::Split { setup.base } else { layout.first_base() };
        VringSetup { layout, base, ..setup }
    }

    pub(super) fn request(&mut self, kind: u32, sector: u64) -> SentRequest {
        let data = [(DATA + 512 * sector, 512)];
        match self {
            Self::Split(driver) => driver.request(kind, sector, &data),
            Self::Packed(driver) => driver.request(kind, sector, &data),
        }
    }

    pub(super) fn wait(&mut self, count: usize) -> Vec<(u32, u32)> {
        match self {
            Self::Split(driver) => driver.wait(count),
            Self::Packed(driver) => driver.wait(count),
        }
    }

    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        match self {
            Self::Split(driver) => driver.used(),
            Self::Packed(driver) => driver.used(),
        }
    }
}

/// A process that serves one ring.
pub(super) struct Process {
    pub(super) rig: Rig,
    pub(super) record: SharedMemory,
}

impl Process {
    /// The first process, and its guest. Its device holds commands.
    fn first(layout: Layout) -> (Self, Guest) {
        let rig = Rig::new(DiskOptions::default());
        rig.disk.hold();
        let (guest, setup) = Guest::new(&rig, layout);
        let (region, record) = inflight(layout);
        let process = Self { rig, record };
        process.start(VringSetup { inflight: Some(region), ..setup });
        (process, guest)
    }

    pub(super) fn start(&self, setup: VringSetup) {
        self.rig.engine.start_ring(setup).unwrap();
        self.rig.engine.set_enabled(0, true);
    }

    /// The next process, with the guest's memory and the record as they are now. Its device holds commands.
    pub(super) fn successor(&self, depth: usize, guest: &mut Guest) -> (Self, VringSetup) {
        let rig = Rig::new(DiskOptions { depth, ..DiskOptions::default() });
        rig.disk.hold();
        copy(self.rig.region.memory(), rig.region.memory());
        let (region, record) = inflight(guest.layout());
        copy(&self.record, &record);
        // The former process ends here. Its guest memory is no longer looked at, and it must not take the guest's kicks.
        self.rig.disk.resume();
        self.rig.engine.stop_ring(0).unwrap();
        guest.driver().memory = rig.region.memory().clone();
        let setup = VringSetup { inflight: Some(region), ..guest.setup() };
        (Self { rig, record }, setup)
    }

    /// Waits until the device holds `count` commands. Returns their first blocks.
    pub(super) fn held(&self, count: usize) -> Vec<u64> {
        wait_until("commands", || self.rig.disk.held().len() >= count);
        let block = |command: &Command| match command {
            Command::Read { block, .. } | Command::Write { block, .. } => *block,
            other => panic!("{other:?}"),
        };
        self.rig.disk.held().iter().map(|held| block(&held.command)).collect()
    }
}

/// A process with requests for sectors 0 to 5, of which 3 and 1 have been completed in this order. Also its guest, and the
/// requests in flight.
pub(super) fn with_four_in_flight(layout: Layout) -> (Process, Guest, Vec<SentRequest>) {
    let (process, mut guest) = Process::first(layout);
    let sent: Vec<_> = (0..6).map(|sector| guest.request(OUT, sector)).collect();
    guest.driver().kick();
    process.held(6);
    for index in [3, 1] {
        process.rig.disk.complete(index);
        guest.wait(1);
    }
    assert_eq!(process.held(4), [0, 2, 4, 5]);
    (process, guest, [0, 2, 4, 5].map(|n| sent[n]).to_vec())
}

fn sorted(heads: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut heads: Vec<_> = heads.collect();
    heads.sort_unstable();
    heads
}

#[test]
fn the_next_process_submits_what_was_in_flight_in_its_order_and_nothing_that_was_published() {
    for layout in BOTH {
        let (process, mut guest, mut sent) = with_four_in_flight(layout);

        let (next, setup) = process.successor(64, &mut guest);
        sent.push(guest.request(IN, 9));
        next.start(setup);

        assert_eq!(next.held(5), [0, 2, 4, 5, 9]);
        next.rig.disk.resume();
        let used = guest.wait(5);
        assert_eq!(sorted(used.iter().map(|used| used.0)), sorted(sent.iter().map(|sent| sent.head.into())));
        assert!(sent.iter().all(|sent| guest.driver().status(*sent) == 0));
        assert_eq!(next.rig.engine.statistics().resubmitted, 4);
    }
}

#[test]
fn a_recovered_ring_calls_even_if_its_base_is_the_first_one() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (process, setup) = process.successor(64, &mut guest);
        count(&guest.driver().call);

        process.start(setup);

        process.held(4);
        assert_ne!(count(&guest.driver().call), 0, "{layout:?}");
    }
}

#[test]
fn a_device_queue_that_is_too_short_delays_what_was_in_flight() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);

        let (next, setup) = process.successor(2, &mut guest);
        guest.request(IN, 9);
        next.start(setup);

        let mut order = Vec::new();
        while order.len() < 5 {
            order.push(next.held(1)[0]);
            next.rig.disk.complete(0);
        }
        assert_eq!(order, [0, 2, 4, 5, 9]);
        guest.wait(5);
    }
}

#[test]
fn a_process_that_ends_during_the_recovery_loses_nothing() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (second, setup) = process.successor(2, &mut guest);
        second.start(setup);
        second.held(2);
        second.rig.disk.complete(1);
        guest.wait(1);
        second.held(2);

        let (third, setup) = second.successor(64, &mut guest);
        third.start(setup);

        assert_eq!(third.held(3), [0, 4, 5]);
        third.rig.disk.resume();
        guest.wait(3);
    }
}

#[test]
fn a_stop_during_the_recovery_waits_for_all_of_it_and_leaves_no_mark() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (next, setup) = process.successor(1, &mut guest);
        next.start(setup);
        next.held(1);

        next.rig.disk.resume();
        let base = next.rig.engine.stop_ring(0).unwrap();

        assert_eq!(base, Some(if layout == Layout::Split { 6 } else { 0x8012_8012 }));
        assert_eq!(guest.wait(4).len(), 4);
        let (last, setup) = next.successor(64, &mut guest);
        last.start(setup);
        guest.request(IN, 9);
        guest.driver().kick();
        assert_eq!(last.held(1), [9]);
        last.rig.disk.resume();
        guest.wait(1);
    }
}

#[test]
fn a_stop_before_the_ring_is_enabled_does_what_was_in_flight_and_nothing_else() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (next, setup) = process.successor(64, &mut guest);
        next.rig.engine.start_ring(setup).unwrap();
        guest.request(IN, 9);

        next.rig.disk.resume();
        let base = next.rig.engine.stop_ring(0).unwrap();

        assert_eq!(base, Some(if layout == Layout::Split { 6 } else { 0x8012_8012 }));
        assert_eq!(guest.used().len(), 4);
    }
}

#[test]
fn a_record_that_contradicts_the_ring_fails_the_ring() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (next, setup) = process.successor(64, &mut guest);
        let base = setup.base;
        match layout {
            // used_idx, one more than the ring's.
            Layout::Split => next.record.write_u16(14, 3),
            // `num` of the first entry.
            Layout::Packed => next.record.write_u16(32 + 6, 2),
        }

        next.start(setup);

        assert!(wait_readable(&guest.driver().err, Duration::from_secs(20)), "err was not signalled");
        guest.request(IN, 9);
        guest.driver().kick();
        assert_eq!(next.rig.engine.stop_ring(0).unwrap(), Some(base));
        assert!(next.rig.disk.held().is_empty());
        assert!(guest.used().is_empty());
    }
}

#[test]
fn a_packed_ring_that_has_started_anew_fails_with_the_record_of_the_former_one() {
    let (process, mut guest, _) = with_four_in_flight(Layout::Packed);
    let (next, setup) = process.successor(64, &mut guest);
    for n in 0..usize::from(SIZE) {
        next.rig.region.memory().write_u64(16 * n + 8, 0);
    }

    next.start(setup);

    assert!(wait_readable(&guest.driver().err, Duration::from_secs(20)), "err was not signalled");
    assert!(next.rig.disk.held().is_empty());
    assert!(guest.used().is_empty());
}

#[test]
fn a_chain_that_has_become_nonsense_completes_with_an_error() {
    let (process, mut guest, sent) = with_four_in_flight(Layout::Split);
    let (next, setup) = process.successor(64, &mut guest);
    // The head of sector 2's chain now links to a descriptor that does not exist.
    let head = sent[1].head;
    let broken = Desc { addr: DATA, len: 16, flags: NEXT, next: SIZE };
    guest.driver().write_desc(setup.desc.start().0, head, broken);

    next.start(setup);
    next.held(3);
    next.rig.disk.resume();

    let used = guest.wait(4);
    assert!(used.contains(&(head.into(), 0)), "{used:?}");
}

#[test]
fn a_ring_that_fails_during_the_recovery_leaves_its_marks_to_the_next_process() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (second, setup) = process.successor(1, &mut guest);
        second.start(setup);
        second.held(1);
        // Its memory is removed: the ring fails. One request is submitted and one waits for the device; they complete.
        let removed = [second.rig.region.gpa()];
        std::thread::scope(|scope| {
            let removal = scope.spawn(|| second.rig.engine.remove_memory(Arc::default(), &removed));
            assert!(wait_readable(&guest.driver().err, Duration::from_secs(20)));
            second.rig.disk.resume();
            removal.join().unwrap().unwrap();
        });
        guest.wait(2);

        let (third, setup) = second.successor(64, &mut guest);
        third.start(setup);

        assert_eq!(third.held(2), [4, 5]);
        third.rig.disk.resume();
        guest.wait(2);
    }
}

#[test]
fn an_append_that_was_in_flight_fails_and_does_not_reach_the_next_device() {
    let zones = ZoneGeometry { blocks: 1024, max_open: 0, max_active: 0, max_append: 4096 };
    let zoned = |hold| {
        let geometry = Geometry { zones: Some(zones), ..DiskOptions::default().geometry };
        let rig = Rig::new(DiskOptions { geometry, ..DiskOptions::default() });
        if hold {
            rig.disk.hold();
        }
        rig
    };
    let first = zoned(true);
    let (mut driver, setup) = SplitDriver::new(first.region.memory().clone(), 0, RingOptions::default());
    let (region, record) = inflight(Layout::Split);
    let process = Process { rig: first, record };
    process.start(VringSetup { inflight: Some(region), ..setup });
    let append = offer_append(&mut driver, 1024, &[(DATA, 512)], 9);
    let read = driver.request(IN, 0, &[(DATA + 512, 512)]);
    driver.kick();
    wait_until("two commands", || process.rig.disk.held().len() == 2);

    let next = zoned(true);
    copy(process.rig.region.memory(), next.region.memory());
    let (region, record) = inflight(Layout::Split);
    copy(&process.record, &record);
    process.rig.disk.resume();
    process.rig.engine.stop_ring(0).unwrap();
    driver.memory = next.region.memory().clone();
    let process = Process { rig: next, record };
    process.start(VringSetup { inflight: Some(region), ..driver.setup(driver.used_idx()) });

    assert_eq!(driver.wait(1), [(u32::from(append.head), 1)], "answered without the device");
    assert_eq!(process.held(1), [0], "the read alone is submitted again");
    process.rig.disk.resume();
    assert_eq!(driver.wait(1), [(u32::from(read.head), 513)]);
    assert_eq!((driver.status(append), driver.status(read)), (1, 0));
}
