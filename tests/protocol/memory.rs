//! Guest memory is added and removed. A failure at any step leaves it unchanged.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use proptest::prelude::*;
use vm_memory::{FileOffset, MmapRegion};

use crate::rig::{Rig, memory};
use crate::rings::{RAM, running};
use crate::wire::{MemoryRegion, Reply, request::*, state};

const PAGE: u64 = 4096;

/// A region of one page, at page 16 × `number` of guest and front-end memory.
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
fn invalid_regions_are_refused() {
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
    for (name, region) in refused {
        assert_eq!(wire.add_region(region, file.as_fd()), 1, "{name}");
        assert_eq!(rig.guest_memory(), spans(&[1]), "{name}");
    }
}

#[test]
fn descriptors_that_are_not_memory_are_refused() {
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
fn memory_that_the_front_end_maps_privately_is_refused() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", PAGE));
    wire.negotiate();
    for (flags, ack) in [(libc::MAP_PRIVATE, 1), (libc::MAP_SHARED, 0)] {
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let size = usize::try_from(PAGE).unwrap();
        let mapping = MmapRegion::<()>::build(Some(offset), size, access, flags).unwrap();
        let region = MemoryRegion { qva: mapping.as_ptr() as u64, offset: 0, ..page(1) };
        assert_eq!(wire.add_region(region, file.as_fd()), ack);
    }
}

#[test]
fn a_region_that_ends_within_a_page_is_mapped_to_the_end_of_the_page() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("buffer", 0x3b10));
    wire.negotiate();
    let region = MemoryRegion { gpa: 0x7f34_3124_2000, len: 0x3b10, qva: 0x7f34_3124_2000, offset: 0 };

    assert_eq!(wire.add_region(region, file.as_fd()), 0);
    assert_eq!(rig.guest_memory(), [(region.gpa, 0x4000)]);
    assert_eq!(wire.remove_region(region), 0);
    assert_eq!(rig.guest_memory(), []);
}

#[test]
fn a_table_changes_only_the_regions_that_differ() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    let table = |numbers: &[u64]| wire.set_table(&numbers.iter().map(|n| (page(*n), file.as_fd())).collect::<Vec<_>>());

    assert_eq!(table(&[3, 1]), 0);
    assert_eq!(rig.guest_memory(), spans(&[1, 3]));
    // One region is removed and one added. A third change, of the region in both tables, would fail.
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

    // Two regions are removed and two added.
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
fn an_invalid_table_is_refused_before_any_change() {
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
fn a_refusal_without_an_acknowledgement_ends_the_connection() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    let payload = [state(0, 0), MemoryRegion { offset: 16 * PAGE, ..page(1) }.bytes()].concat();
    wire.send(ADD_MEM_REG, &payload, &[file.as_fd()]);
    assert_eq!(wire.reply(), Reply::Closed);
}

#[test]
fn more_regions_than_slots_are_refused() {
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
fn a_ring_is_suspended_while_its_memory_is_removed() {
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
fn memory_that_can_be_removed_only_while_the_device_is_idle_is_removed() {
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
fn a_failure_that_cannot_be_undone_ends_the_connection() {
    let rig = Rig::new();
    let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
    wire.negotiate();
    assert_eq!(wire.set_table(&[(page(1), file.as_fd()), (page(2), file.as_fd())]), 0);

    // The first region is removed. The second cannot be removed, and the first cannot be added again.
    rig.fail_all_after(1);
    assert_eq!(wire.set_table(&[(page(3), file.as_fd())]), 1);
    assert_eq!(wire.reply(), Reply::Closed);

    rig.fail_after(-1);
    rig.connect().negotiate();
}

/// A message about memory, by numbers of pages.
#[derive(Clone, Debug)]
enum Change {
    Table(BTreeSet<u64>),
    Add(u64),
    Remove(u64),
}

/// Messages, each with the step that fails; -1 for none.
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

    /// Whatever the messages are and whichever steps fail, exactly the acknowledged regions are mapped.
    #[test]
    fn exactly_the_acknowledged_regions_are_mapped(changes in changes()) {
        let rig = Rig::new();
        let (wire, file) = (rig.connect(), memory("ram", 16 * PAGE));
        wire.negotiate();
        let mut model = BTreeSet::new();
        for (change, failing) in changes {
            let mut next = model.clone();
            let valid = match &change {
                Change::Table(pages) => { next = pages.clone(); true }
                Change::Add(page) => { next.insert(*page); true }
                Change::Remove(page) => next.remove(page),
            };
            let steps = model.symmetric_difference(&next).count();
            let fails = !valid || (0..i64::try_from(steps).unwrap()).contains(&failing);
            rig.fail_after(failing);
            let ack = match change {
                Change::Table(pages) => {
                    wire.set_table(&pages.iter().rev().map(|n| (page(*n), file.as_fd())).collect::<Vec<_>>())
                }
                Change::Add(number) => wire.add_region(page(number), file.as_fd()),
                Change::Remove(number) => wire.remove_region(page(number)),
            };
            rig.fail_after(-1);
            prop_assert_eq!(ack, u64::from(fails));
            if !fails {
                model = next;
            }
            let expected: Vec<u64> = model.iter().copied().collect();
            prop_assert_eq!(rig.guest_memory(), spans(&expected));
        }
    }
}
