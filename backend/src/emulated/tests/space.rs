//! How memory is exposed to, and taken from, a function that goes behind the caches: what each side finds at the two moments
//! that count. The steps are those of `iommu/sequence.rs`, which runs them on the kernel's address spaces too.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::host::small;
use crate::addr::{Gpa, Iova, Qva, Span};
use crate::emulated::{StaleLines, LAST_WRITE, Machine, Options};
use crate::hardware::{AddressSpace, MapError, SpaceStatistics};
use crate::memory::{Region, RegionSpec};

/// Crosses two of the places where the space cuts memory into pieces.
const AT: u64 = 0x11_f000;
const LEN: u64 = 0x2_3000;

fn region(gpa: u64, len: u64) -> Arc<Region> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len).unwrap();
    let gpa = Span::new(Gpa(gpa), len).unwrap();
    let spec = RegionSpec { gpa, qva: Qva(gpa.start().0), offset: 0, file: Arc::new(file) };
    let region = Arc::new(Region::map(spec).unwrap());
    fill(&region, 1);
    region
}

/// A pattern without the byte that stands for another owner's data.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|n| (n / 7 % 200) as u8 ^ seed & 0xf).collect()
}

fn fill(region: &Region, seed: u8) {
    region.memory().copy_from(0, &pattern(seed, region.gpa().len()));
}

fn seen_by_cpus(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.memory().len()];
    region.memory().copy_to(0, &mut bytes);
    bytes
}

struct Fixture {
    machine: Machine,
    space: Arc<dyn AddressSpace>,
    region: Arc<Region>,
}

impl Fixture {
    fn new() -> Self {
        let machine = Machine::new(Options { no_snoop: true, snoop_enforced: false, ..small() }).unwrap();
        let (space, region) = (machine.staged_space(), region(AT, LEN));
        Self { machine, space, region }
    }

    /// All of the region as the function finds it.
    fn seen_by_function(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        self.machine.iommu().read(Iova(AT), &mut bytes).unwrap();
        bytes
    }

    fn function_writes(&self, seed: u8) {
        self.machine.iommu().write(Iova(AT), &pattern(seed, LEN)).unwrap();
    }

    fn assert_agreed(&self) {
        assert_eq!(self.machine.stale_lines(), StaleLines::default());
    }
}

#[test]
fn memory_is_reachable_only_with_what_the_cpus_wrote_to_it() {
    let fixture = Fixture::new();

    fixture.space.add(&fixture.region).unwrap();

    assert!(fixture.seen_by_function() == pattern(1, LEN));
    fixture.assert_agreed();
    let SpaceStatistics { mapped, staged, flushed_at_map, .. } = fixture.space.statistics();
    assert_eq!((mapped, staged, flushed_at_map), (LEN, 3, LEN));
}

#[test]
fn memory_that_was_taken_away_shows_what_the_function_wrote_to_the_end() {
    let fixture = Fixture::new();
    fixture.space.add(&fixture.region).unwrap();
    fixture.function_writes(2);

    fixture.space.remove(&fixture.region).unwrap();

    assert!(seen_by_cpus(&fixture.region) == pattern(2, LEN));
    fixture.assert_agreed();
    assert_eq!(fixture.machine.iommu().mapped(), []);
    let SpaceStatistics { mapped, staged, flushed_at_unmap, .. } = fixture.space.statistics();
    assert_eq!((mapped, staged, flushed_at_unmap), (0, 6, LEN));
}

#[test]
fn memory_that_comes_again_has_no_line_of_its_former_life() {
    let fixture = Fixture::new();
    for seed in 2..5 {
        fixture.space.add(&fixture.region).unwrap();
        fixture.function_writes(seed);
        fixture.space.remove(&fixture.region).unwrap();
        fill(&fixture.region, seed + 7);
        fixture.space.add(&fixture.region).unwrap();
        assert!(fixture.seen_by_function() == pattern(seed + 7, LEN));
        fixture.space.remove(&fixture.region).unwrap();
    }
    fixture.assert_agreed();
}

#[test]
fn without_memory_for_the_copy_a_region_stays_until_the_device_rests() {
    let fixture = Fixture::new();
    let other = region(0x100_0000, 0x1000);
    fixture.space.add(&fixture.region).unwrap();
    fixture.space.add(&other).unwrap();
    fixture.function_writes(3);
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(1, SeqCst);

    let refused = fixture.space.remove(&fixture.region).unwrap_err();
    let reachable = fixture.seen_by_function();
    fixture.space.remove_while_idle(&fixture.region).unwrap();

    assert!(matches!(refused, MapError::DeviceMustBeIdle { .. }), "{refused}");
    assert!(reachable == pattern(3, LEN), "nothing has been taken away");
    assert!(seen_by_cpus(&fixture.region) == pattern(3, LEN));
    fixture.assert_agreed();
    assert_eq!(fixture.machine.iommu().mapped(), [other.gpa().identity_iova()]);
    fixture.machine.iommu().write(Iova(0x100_0000), &[1; 64]).expect("the function is attached again");
}

#[test]
fn what_has_been_taken_away_before_memory_ran_out_is_not_missed_afterwards() {
    let fixture = Fixture::new();
    fixture.space.add(&fixture.region).unwrap();
    fixture.function_writes(3);
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(2, SeqCst);

    let refused = fixture.space.remove(&fixture.region).unwrap_err();
    let left = fixture.machine.iommu().mapped().len();
    fixture.space.remove(&fixture.region).unwrap();

    assert!(matches!(refused, MapError::DeviceMustBeIdle { .. }), "{refused}");
    assert_eq!((left, fixture.machine.iommu().mapped().len()), (2, 0), "of three pieces");
    assert!(seen_by_cpus(&fixture.region) == pattern(3, LEN));
    fixture.assert_agreed();
    assert!(matches!(fixture.space.remove(&fixture.region), Err(MapError::NotMapped { .. })));
}

#[test]
fn where_nothing_can_be_mapped_before_an_attach_memory_is_flushed_before_it_is_used() {
    let fixture = Fixture::new();
    fixture.machine.space_faults().unwrap().map_needs_attach.store(true, SeqCst);
    let before = fixture.machine.order();

    fixture.space.add(&fixture.region).unwrap();

    assert_eq!((before, fixture.machine.order()), ("pinned, flushed, mapped", "mapped, flushed, published"));
    assert!(fixture.seen_by_function() == pattern(1, LEN));
    fixture.function_writes(5);
    fixture.space.remove(&fixture.region).unwrap();
    assert!(seen_by_cpus(&fixture.region) == pattern(5, LEN));
    assert_eq!(fixture.machine.stale_lines().at_unpin, 0);
}

#[test]
fn a_region_that_cannot_be_mapped_to_its_end_is_not_mapped_at_all() {
    let fixture = Fixture::new();
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(3, SeqCst);

    let error = fixture.space.add(&fixture.region).unwrap_err();

    assert!(error.to_string().contains("map for DMA after the flush"), "{error}");
    assert_eq!(fixture.machine.iommu().mapped(), []);
    assert_eq!(fixture.space.statistics().mapped, 0);
    fixture.space.add(&fixture.region).unwrap();
    assert!(fixture.seen_by_function() == pattern(1, LEN));
}

#[test]
fn a_region_over_another_is_refused() {
    let fixture = Fixture::new();
    fixture.space.add(&region(AT + LEN - 0x1000, 0x4000)).unwrap();
    let before = fixture.machine.iommu().mapped();

    assert!(matches!(fixture.space.add(&fixture.region), Err(MapError::Overlap { .. })));

    assert_eq!(fixture.machine.iommu().mapped(), before);
}

/// Exposes the region, lets the function write a last byte in each of its pieces as it is cut off from it, and gives those
/// that CPUs do not see afterwards.
fn lost(take_away: impl Fn(&Fixture)) -> Vec<u64> {
    let seen = |offset: u64| {
        let fixture = Fixture::new();
        fixture.space.add(&fixture.region).unwrap();
        *fixture.machine.space_faults().unwrap().last_write.lock().unwrap() = Some(Iova(AT + offset));
        take_away(&fixture);
        fixture.assert_agreed();
        fixture.region.memory().read_u8(offset as usize) == LAST_WRITE
    };
    [0, 0x1000, LEN - 1].into_iter().filter(|offset| !seen(*offset)).collect()
}

#[test]
fn what_the_function_writes_until_it_is_cut_off_is_not_lost() {
    assert!(lost(|fixture| fixture.space.remove(&fixture.region).unwrap()).is_empty());
}

#[test]
fn what_the_function_writes_until_it_is_detached_is_not_lost_either() {
    assert!(lost(|fixture| fixture.space.remove_while_idle(&fixture.region).unwrap()).is_empty());
}

#[test]
fn the_drivers_own_memory_is_flushed_in_both_directions_too() {
    let fixture = Fixture::new();
    let buffer = fixture.space.buffer(5000).unwrap();
    let shared = buffer.memory().clone();
    let mut found = vec![1; 5000];
    fixture.machine.iommu().read(buffer.span().start(), &mut found).unwrap();

    fixture.machine.iommu().write(buffer.span().start(), &[9; 5000]).unwrap();
    drop(buffer);

    assert!(found == [0; 5000], "zeroed, and not what another owner left");
    assert_eq!(shared.read_u8(4999), 9);
    fixture.assert_agreed();
}

#[test]
fn where_snooping_is_enforced_nothing_is_flushed_and_nothing_staged() {
    let machine = Machine::new(small()).unwrap();
    let (space, region) = (machine.staged_space(), region(AT, LEN));
    space.add(&region).unwrap();
    drop(space.buffer(4096).unwrap());
    space.remove(&region).unwrap();

    let SpaceStatistics { maps, staged, flushed_at_map, flushed_at_unmap, .. } = space.statistics();
    assert_eq!((maps, staged, flushed_at_map, flushed_at_unmap), (2, 0, 0, 0));
}
