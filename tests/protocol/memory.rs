//! Guest memory comes and goes, and a failure at any step leaves it as it was.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use proptest::prelude::*;
use vm_memory::{FileOffset, MmapRegion};

use crate::rig::{Rig, memory};
use crate::rings::{RAM, running};
use crate::wire::{MemoryRegion, Reply, request::*, state};

const PAGE: u64 = 4096;

/// One page each, at page 16, 32, 48 … of guest and front-end memory.
fn page(number: u64) -> MemoryRegion {
    MemoryRegion { gpa: number * 16 * PAGE, len: PAGE, qva: (1 << 40) + number * 16 * PAGE, offset: number * PAGE }
}

fn spans(numbers: &[u64]) -> Vec<(u64, u64)> {
    numbers.iter().map(|number| (page(*number).gpa, PAGE)).collect()
}

#[test]
fn regions_are_mapped_when_acknowledged_and_unmapped_when_removed() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();

    assert_eq!(wire.add_region(page(2), file.as_fd()), 0);
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    assert_eq!(rig.guest_memory(), spans(&[1, 2]));
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0, "again");
    assert_eq!(rig.guest_memory(), spans(&[1, 2]));
    assert_eq!(wire.remove_region(page(2)), 0);
    assert_eq!(rig.guest_memory(), spans(&[1]));

    assert_eq!(wire.remove_region(page(2)), 1, "unknown now");
    assert_eq!(wire.remove_region(MemoryRegion { qva: 0, ..page(1) }), 1, "another address in the front-end");
    assert_eq!(rig.guest_memory(), spans(&[1]));
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 4 * PAGE));
    wire.negotiate();
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    let refused = [
        ("empty", MemoryRegion { len: 0, ..page(2) }),
        ("wraps in guest addresses", MemoryRegion { gpa: u64::MAX - PAGE + 1, len: 2 * PAGE, ..page(2) }),
        ("wraps in front-end addresses", MemoryRegion { qva: u64::MAX - 10, ..page(2) }),
        ("wraps in the file", MemoryRegion { offset: u64::MAX - PAGE + 1, ..page(2) }),
        ("past the end of the file", MemoryRegion { offset: 4 * PAGE, ..page(2) }),
        ("misaligned", MemoryRegion { gpa: page(2).gpa + 8, ..page(2) }),
        ("overlaps in guest addresses", MemoryRegion { gpa: page(1).gpa, ..page(2) }),
        ("overlaps in front-end addresses", MemoryRegion { qva: page(1).qva + PAGE - 1, ..page(2) }),
        ("in the window of the interrupt controller", MemoryRegion { gpa: 0xfee0_0000, ..page(2) }),
        ("beyond the IOMMU", MemoryRegion { gpa: 1 << 50, ..page(2) }),
    ];
    for (why, place) in refused {
        assert_eq!(wire.add_region(place, file.as_fd()), 1, "{why}");
        assert_eq!(rig.guest_memory(), spans(&[1]), "{why}");
    }
}

#[test]
fn memory_that_is_no_memory_is_refused() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    assert_eq!(wire.add_region(page(1), pipe.as_fd()), 1);
    assert_eq!(wire.add_region(page(1), wire.socket.as_fd()), 1);
    let directory = std::fs::File::open("/").unwrap();
    assert_eq!(wire.add_region(page(1), directory.as_fd()), 1);
}

#[test]
fn memory_that_the_front_end_itself_sees_as_a_private_copy_is_refused() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", PAGE));
    wire.negotiate();
    for (how, told) in [(libc::MAP_PRIVATE, 1), (libc::MAP_SHARED, 0)] {
        let place = FileOffset::new(file.try_clone().unwrap(), 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let size = usize::try_from(PAGE).unwrap();
        let mapping = MmapRegion::<()>::build(Some(place), size, access, how).unwrap();
        let seen = MemoryRegion { qva: mapping.as_ptr() as u64, offset: 0, ..page(1) };
        assert_eq!(wire.add_region(seen, file.as_fd()), told);
    }
}

#[test]
fn a_region_of_part_pages_is_served_to_the_end_of_its_page() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("buffer", 0x3b10));
    wire.negotiate();
    let place = MemoryRegion { gpa: 0x7f34_3124_2000, len: 0x3b10, qva: 0x7f34_3124_2000, offset: 0 };

    assert_eq!(wire.add_region(place, file.as_fd()), 0);
    assert_eq!(rig.guest_memory(), [(place.gpa, 0x4000)]);
    assert_eq!(wire.remove_region(place), 0);
    assert_eq!(rig.guest_memory(), []);
}

#[test]
fn a_table_replaces_only_the_difference() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    let table = |numbers: &[u64]| wire.set_table(&numbers.iter().map(|n| (page(*n), file.as_fd())).collect::<Vec<_>>());

    assert_eq!(table(&[3, 1]), 0);
    assert_eq!(rig.guest_memory(), spans(&[1, 3]));
    // One region goes, one comes: two changes of the address space. A third, to the one that stays, would fail.
    rig.fail_after(2);
    assert_eq!(table(&[3, 2]), 0);
    assert_eq!(rig.guest_memory(), spans(&[2, 3]));
}

#[test]
fn a_failure_at_any_step_leaves_memory_as_it_was() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    let table = |numbers: &[u64]| wire.set_table(&numbers.iter().map(|n| (page(*n), file.as_fd())).collect::<Vec<_>>());
    assert_eq!(table(&[1, 2, 3]), 0);

    // Two regions go, two come.
    for step in 0..4 {
        rig.fail_after(step);
        assert_eq!(table(&[3, 4, 5]), 1, "step {step}");
        assert_eq!(rig.guest_memory(), spans(&[1, 2, 3]), "step {step}");
    }

    rig.fail_after(-1);
    assert_eq!(table(&[3, 4, 5]), 0);
    assert_eq!(rig.guest_memory(), spans(&[3, 4, 5]));
}

#[test]
fn a_mistake_in_a_table_is_found_before_anything_is_touched() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    rig.fail_after(0);

    let past_the_end = MemoryRegion { offset: 16 * PAGE, ..page(3) };
    assert_eq!(wire.set_table(&[(page(2), file.as_fd()), (past_the_end, file.as_fd())]), 1);
    assert_eq!(wire.set_table(&[(page(2), file.as_fd()), (page(2), file.as_fd())]), 1, "overlap");

    rig.fail_after(-1);
    assert_eq!(rig.guest_memory(), spans(&[1]));
}

#[test]
fn a_refusal_that_cannot_be_told_ends_the_conversation() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    let payload = [state(0, 0), MemoryRegion { offset: 16 * PAGE, ..page(1) }.bytes()].concat();
    wire.send(ADD_MEM_REG, &payload, &[file.as_fd()]);
    assert_eq!(wire.reply(), Reply::Closed);
}

#[test]
fn more_regions_than_promised_are_refused() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 600 * PAGE));
    wire.negotiate();
    let slots = wire.get(GET_MAX_MEM_SLOTS);
    assert_eq!(slots, 509);
    for number in 1..=slots {
        assert_eq!(wire.add_region(page(number), file.as_fd()), 0, "region {number}");
    }
    assert_eq!(wire.add_region(page(slots + 1), file.as_fd()), 1);
}

#[test]
fn a_ring_waits_while_its_memory_is_exchanged() {
    let rig = Rig::new();
    let (wire, ram, _events) = running(&rig);
    assert_eq!(wire.remove_region(RAM), 0);
    assert_eq!(rig.guest_memory(), []);
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0), &[]), 1, "waiting for memory");

    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);

    assert_eq!(wire.call(SET_VRING_NUM, &state(0, 16), &[]), 1, "it runs again");
    assert_eq!(wire.stop_ring(0), 0);
}

#[test]
fn a_failed_removal_leaves_the_ring_running() {
    let rig = Rig::new();
    let (wire, _ram, _events) = running(&rig);
    rig.fail_after(0);

    assert_eq!(wire.remove_region(RAM), 1);

    assert_eq!(rig.guest_memory(), [(RAM.gpa, RAM.len)]);
    assert_eq!(wire.call(SET_VRING_NUM, &state(0, 16), &[]), 1, "it runs");
}

#[test]
fn memory_that_can_go_only_while_the_device_rests_goes_all_the_same() {
    let rig = Rig::new();
    let (wire, ram, _events) = running(&rig);
    rig.remove_only_while_idle();

    assert_eq!(wire.remove_region(RAM), 0);

    assert_eq!((rig.guest_memory(), rig.removals_while_idle()), (vec![], 1));
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    drop(wire);
    rig.connect().negotiate();
    assert_eq!((rig.guest_memory(), rig.removals_while_idle()), (vec![], 2));
}

#[test]
fn a_failure_that_cannot_be_undone_ends_the_conversation() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    assert_eq!(wire.set_table(&[(page(1), file.as_fd()), (page(2), file.as_fd())]), 0);

    // The first region goes; the second does not, and the first cannot be brought back.
    rig.fail_all_after(1);
    assert_eq!(wire.set_table(&[(page(3), file.as_fd())]), 1);
    assert_eq!(wire.reply(), Reply::Closed);

    rig.fail_after(-1);
    rig.connect().negotiate();
}

/// A message about memory, in pages; the number says which step of it fails, if it has so many.
#[derive(Clone, Debug)]
enum Change {
    Table(BTreeSet<u64>),
    Add(u64),
    Remove(u64),
}

fn changes() -> impl Strategy<Value = Vec<(Change, i64)>> {
    let page = || 1..8_u64;
    let change = prop_oneof![
        prop::collection::btree_set(page(), 1..6).prop_map(Change::Table),
        page().prop_map(Change::Add),
        page().prop_map(Change::Remove),
    ];
    prop::collection::vec((change, -1..6_i64), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is asked for and whichever step fails: the device reaches exactly what has been acknowledged.
    #[test]
    fn what_is_mapped_is_what_was_acknowledged(changes in changes()) {
        let rig = Rig::new();
        let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
        wire.negotiate();
        let mut model = BTreeSet::new();
        for (change, failing) in changes {
            let mut next = model.clone();
            let known = match &change {
                Change::Table(pages) => { next = pages.clone(); true }
                Change::Add(page) => { next.insert(*page); true }
                Change::Remove(page) => next.remove(page),
            };
            let steps = model.symmetric_difference(&next).count();
            let fails = !known || (0..i64::try_from(steps).unwrap()).contains(&failing);
            rig.fail_after(failing);
            let told = match change {
                Change::Table(pages) => {
                    wire.set_table(&pages.iter().rev().map(|n| (page(*n), file.as_fd())).collect::<Vec<_>>())
                }
                Change::Add(number) => wire.add_region(page(number), file.as_fd()),
                Change::Remove(number) => wire.remove_region(page(number)),
            };
            rig.fail_after(-1);
            prop_assert_eq!(told, u64::from(fails));
            if !fails {
                model = next;
            }
            let expected: Vec<u64> = model.iter().copied().collect();
            prop_assert_eq!(rig.guest_memory(), spans(&expected));
        }
    }
}
