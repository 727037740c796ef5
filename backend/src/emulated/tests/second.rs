//! A second address space, and the exchange of both.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::host::small;
use crate::addr::{Gpa, Iova, Qva, Span};
use crate::emulated::{Machine, Options, StaleLines};
use crate::hardware::MapError;
use crate::memory::{Region, RegionSpec};

const AT: u64 = 0x10_0000;
const LEN: u64 = 0x2_3000;

fn region(content: u8) -> Arc<Region> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, LEN).unwrap();
    let gpa = Span::new(Gpa(AT), LEN).unwrap();
    let spec = RegionSpec { gpa, qva: Qva(AT), offset: 0, file: Arc::new(file) };
    let region = Arc::new(Region::map(spec).unwrap());
    region.memory().copy_from(0, &vec![content; LEN as usize]);
    region
}

/// With and without an IOMMU that enforces snooping.
fn machines() -> [Machine; 2] {
    [true, false]
        .map(|snoop_enforced| Machine::new(Options { no_snoop: !snoop_enforced, snoop_enforced, ..small() }).unwrap())
}

fn read_by_function(machine: &Machine, at: Iova) -> u8 {
    let mut byte = [0];
    machine.iommu().read(at, &mut byte).unwrap();
    byte[0]
}

#[test]
fn the_function_uses_the_second_space_after_the_exchange_and_not_before() {
    for machine in machines() {
        let space = machine.staged_space();
        let (first, next) = (region(1), region(2));
        space.add(&first).unwrap();
        let second = space.second().unwrap();
        second.space().add(&next).unwrap();
        let last = Iova(AT + LEN - 1);
        assert_eq!((read_by_function(&machine, Iova(AT)), read_by_function(&machine, last)), (1, 1));

        second.exchange().unwrap();

        assert_eq!((read_by_function(&machine, Iova(AT)), read_by_function(&machine, last)), (2, 2));
        second.space().remove(&first).unwrap();
        drop(second);
        assert_eq!((read_by_function(&machine, Iova(AT)), read_by_function(&machine, last)), (2, 2));
        space.remove(&next).unwrap();
        assert_eq!((machine.iommu().mapped(), machine.stale_lines()), (vec![], StaleLines::default()));
    }
}

#[test]
fn buffers_are_in_both_spaces_as_long_as_they_exist() {
    for machine in machines() {
        let space = machine.staged_space();
        let before = space.buffer(0x3_0000).unwrap();
        let gone = space.buffer(4096).unwrap();
        let second = space.second().unwrap();
        let during = space.buffer(4096).unwrap();
        drop(gone);

        second.exchange().unwrap();

        let write = |span: Span<Iova>| machine.iommu().write(span.start(), &[7]);
        write(before.span()).unwrap();
        write(during.span()).unwrap();
        let mapped = space.statistics().mapped;
        assert_eq!((mapped, second.space().statistics().mapped), (0x3_1000, 0x3_1000));
        drop((before, during));
        assert_eq!((machine.iommu().mapped(), second.space().statistics().mapped), (vec![], 0));
    }
}

#[test]
fn a_buffer_is_placed_where_neither_space_has_anything() {
    for machine in machines() {
        let space = machine.staged_space();
        let second = space.second().unwrap();
        let top = space.allowed().unwrap().last().unwrap().last().0;
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 4096).unwrap();
        let gpa = Span::new(Gpa(top - 4095), 4096).unwrap();
        let spec = RegionSpec { gpa, qva: Qva(gpa.start().0), offset: 0, file: Arc::new(file) };
        let guest = Arc::new(Region::map(spec).unwrap());
        second.space().add(&guest).unwrap();

        let buffer = space.buffer(4096).unwrap();

        assert!(!buffer.span().overlaps(&guest.iova()), "{}", buffer.span());
        second.space().remove(&guest).unwrap();
    }
}

#[test]
fn there_is_one_second_space_at_a_time() {
    for machine in machines() {
        let space = machine.staged_space();
        let second = space.second().unwrap();

        let another = space.second().err().expect("refused");

        assert!(matches!(another, MapError::NoSecondSpace { .. }), "{another}");
        drop(second);
        assert!(space.second().is_ok());
    }
}
