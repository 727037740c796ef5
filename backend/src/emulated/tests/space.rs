//! Mapping and unmapping memory for a function that bypasses the caches: CPUs and function must see each other's writes. The
//! tests run the steps of `iommu/sequence.rs`, which also runs them on the kernel's address spaces.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::host::small;
use crate::addr::{Gpa, Iova, Qva, Span};
use crate::emulated::{LAST_WRITE, Machine, Options, StaleLines};
use crate::hardware::{AddressSpace, MapError, SpaceStatistics};
use crate::memory::{Region, RegionSpec};

/// A region that the space splits into three pieces.
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

/// A pattern without 0xdb, the value of DRAM that was never written back.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len).map(|n| (n / 7 % 200) as u8 ^ seed & 0xf).collect()
}

fn fill(region: &Region, seed: u8) {
    region.memory().copy_from(0, &pattern(seed, region.gpa().len()));
}

fn read_by_cpus(region: &Region) -> Vec<u8> {
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

    /// Reads the whole region by DMA.
    fn read_by_function(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        self.machine.iommu().read(Iova(AT), &mut bytes).unwrap();
        bytes
    }

    fn write_by_function(&self, seed: u8) {
        self.machine.iommu().write(Iova(AT), &pattern(seed, LEN)).unwrap();
    }

    fn assert_no_stale_lines(&self) {
        assert_eq!(self.machine.stale_lines(), StaleLines::default());
    }
}

#[test]
fn memory_is_mapped_with_what_the_cpus_wrote() {
    let fixture = Fixture::new();

    fixture.space.add(&fixture.region).unwrap();

    assert!(fixture.read_by_function() == pattern(1, LEN));
    fixture.assert_no_stale_lines();
    let SpaceStatistics { mapped, staged, flushed_at_map, .. } = fixture.space.statistics();
    assert_eq!((mapped, staged, flushed_at_map), (LEN, 3, LEN));
}

#[test]
fn unmapped_memory_shows_what_the_function_wrote() {
    let fixture = Fixture::new();
    fixture.space.add(&fixture.region).unwrap();
    fixture.write_by_function(2);

    fixture.space.remove(&fixture.region).unwrap();

    assert!(read_by_cpus(&fixture.region) == pattern(2, LEN));
    fixture.assert_no_stale_lines();
    assert_eq!(fixture.machine.iommu().mapped(), []);
    let SpaceStatistics { mapped, staged, flushed_at_unmap, .. } = fixture.space.statistics();
    assert_eq!((mapped, staged, flushed_at_unmap), (0, 6, LEN));
}

#[test]
fn memory_mapped_again_has_no_stale_lines() {
    let fixture = Fixture::new();
    for seed in 2..5 {
        fixture.space.add(&fixture.region).unwrap();
        fixture.write_by_function(seed);
        fixture.space.remove(&fixture.region).unwrap();
        fill(&fixture.region, seed + 7);
        fixture.space.add(&fixture.region).unwrap();
        assert!(fixture.read_by_function() == pattern(seed + 7, LEN));
        fixture.space.remove(&fixture.region).unwrap();
    }
    fixture.assert_no_stale_lines();
}

#[test]
fn a_region_that_cannot_be_staged_stays_mapped_until_the_device_is_idle() {
    let fixture = Fixture::new();
    let other = region(0x100_0000, 0x1000);
    fixture.space.add(&fixture.region).unwrap();
    fixture.space.add(&other).unwrap();
    fixture.write_by_function(3);
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(1, SeqCst);

    let refused = fixture.space.remove(&fixture.region).unwrap_err();
    let still_mapped = fixture.read_by_function();
    fixture.space.remove_while_idle(&fixture.region).unwrap();

    assert!(matches!(refused, MapError::DeviceMustBeIdle { .. }), "{refused}");
    assert!(still_mapped == pattern(3, LEN), "nothing was unmapped");
    assert!(read_by_cpus(&fixture.region) == pattern(3, LEN));
    fixture.assert_no_stale_lines();
    assert_eq!(fixture.machine.iommu().mapped(), [other.iova()]);
    fixture.machine.iommu().write(Iova(0x100_0000), &[1; 64]).expect("the function is attached again");
}

#[test]
fn a_remove_that_ran_out_of_memory_can_be_repeated() {
    let fixture = Fixture::new();
    fixture.space.add(&fixture.region).unwrap();
    fixture.write_by_function(3);
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(2, SeqCst);

    let refused = fixture.space.remove(&fixture.region).unwrap_err();
    let left = fixture.machine.iommu().mapped().len();
    fixture.space.remove(&fixture.region).unwrap();

    assert!(matches!(refused, MapError::DeviceMustBeIdle { .. }), "{refused}");
    assert_eq!((left, fixture.machine.iommu().mapped().len()), (2, 0), "of three pieces");
    assert!(read_by_cpus(&fixture.region) == pattern(3, LEN));
    fixture.assert_no_stale_lines();
    assert!(matches!(fixture.space.remove(&fixture.region), Err(MapError::NotMapped { .. })));
}

#[test]
fn if_mapping_needs_an_attached_device_memory_is_flushed_after_the_map() {
    let fixture = Fixture::new();
    fixture.machine.space_faults().unwrap().map_needs_attach.store(true, SeqCst);
    let before = fixture.machine.order();

    fixture.space.add(&fixture.region).unwrap();

    assert_eq!((before, fixture.machine.order()), ("pinned, flushed, mapped", "mapped, flushed, published"));
    assert!(fixture.read_by_function() == pattern(1, LEN));
    fixture.write_by_function(5);
    fixture.space.remove(&fixture.region).unwrap();
    assert!(read_by_cpus(&fixture.region) == pattern(5, LEN));
    assert_eq!(fixture.machine.stale_lines().at_unpin, 0);
}

#[test]
fn a_failed_map_leaves_nothing_mapped() {
    let fixture = Fixture::new();
    fixture.machine.space_faults().unwrap().fail_nth_copy.store(3, SeqCst);

    let error = fixture.space.add(&fixture.region).unwrap_err();

    assert!(error.to_string().contains("map for DMA after the flush"), "{error}");
    assert_eq!(fixture.machine.iommu().mapped(), []);
    assert_eq!(fixture.space.statistics().mapped, 0);
    fixture.space.add(&fixture.region).unwrap();
    assert!(fixture.read_by_function() == pattern(1, LEN));
}

#[test]
fn what_the_device_wrote_before_a_map_failed_is_not_lost() {
    let fixture = Fixture::new();
    let faults = fixture.machine.space_faults().unwrap();
    faults.fail_nth_copy.store(3, SeqCst);
    *faults.last_write.lock().unwrap() = Some(Iova(AT));

    fixture.space.add(&fixture.region).unwrap_err();

    assert_eq!(fixture.region.memory().read_u8(0), LAST_WRITE);
    fixture.assert_no_stale_lines();
}

#[test]
fn a_failed_map_is_undone_without_memory_for_it() {
    let fixture = Fixture::new();
    let faults = fixture.machine.space_faults().unwrap();
    faults.fail_copies_from.store(3, SeqCst);
    *faults.last_write.lock().unwrap() = Some(Iova(AT));

    fixture.space.add(&fixture.region).unwrap_err();

    assert_eq!(fixture.machine.iommu().mapped(), []);
    assert_eq!(fixture.region.memory().read_u8(0), LAST_WRITE, "flushed when it was no longer pinned");
}

#[test]
fn memory_that_is_truncated_between_its_pin_and_its_flush_is_refused() {
    let fixture = Fixture::new();
    let file = fixture.region.file().try_clone().unwrap();
    *fixture.machine.space_faults().unwrap().truncate_after_pin.lock().unwrap() = Some(file);

    let error = fixture.space.add(&fixture.region).unwrap_err();

    assert!(error.to_string().contains("truncated the file"), "{error}");
    assert_eq!(fixture.machine.iommu().mapped(), []);
}

#[test]
fn memory_that_is_truncated_before_its_flush_is_refused_also_where_it_is_flushed_after_the_map() {
    let fixture = Fixture::new();
    let faults = fixture.machine.space_faults().unwrap();
    faults.map_needs_attach.store(true, SeqCst);
    *faults.truncate_after_pin.lock().unwrap() = Some(fixture.region.file().try_clone().unwrap());

    let error = fixture.space.add(&fixture.region).unwrap_err();

    assert!(error.to_string().contains("truncated the file"), "{error}");
    assert_eq!(fixture.machine.iommu().mapped(), []);
}

#[test]
fn an_overlapping_region_is_refused() {
    let fixture = Fixture::new();
    fixture.space.add(&region(AT + LEN - 0x1000, 0x4000)).unwrap();
    let before = fixture.machine.iommu().mapped();

    assert!(matches!(fixture.space.add(&fixture.region), Err(MapError::Overlap { .. })));

    assert_eq!(fixture.machine.iommu().mapped(), before);
}

/// Maps the region, lets the function write a byte just before it loses access, and unmaps with `remove`. Returns the offsets
/// at which CPUs do not see that byte.
fn lost_writes(remove: impl Fn(&Fixture)) -> Vec<u64> {
    let visible = |offset: u64| {
        let fixture = Fixture::new();
        fixture.space.add(&fixture.region).unwrap();
        *fixture.machine.space_faults().unwrap().last_write.lock().unwrap() = Some(Iova(AT + offset));
        remove(&fixture);
        fixture.assert_no_stale_lines();
        fixture.region.memory().read_u8(offset as usize) == LAST_WRITE
    };
    [0, 0x1000, LEN - 1].into_iter().filter(|offset| !visible(*offset)).collect()
}

#[test]
fn a_write_just_before_the_unmap_is_not_lost() {
    assert!(lost_writes(|fixture| fixture.space.remove(&fixture.region).unwrap()).is_empty());
}

#[test]
fn a_write_just_before_the_detach_is_not_lost() {
    assert!(lost_writes(|fixture| fixture.space.remove_while_idle(&fixture.region).unwrap()).is_empty());
}

#[test]
fn driver_buffers_are_flushed_on_map_and_on_unmap() {
    let fixture = Fixture::new();
    let buffer = fixture.space.buffer(5000).unwrap();
    let shared = buffer.memory().clone();
    let mut found = vec![1; 5000];
    fixture.machine.iommu().read(buffer.span().start(), &mut found).unwrap();

    fixture.machine.iommu().write(buffer.span().start(), &[9; 5000]).unwrap();
    drop(buffer);

    assert!(found == [0; 5000], "zero, not the data of a former owner");
    assert_eq!(shared.read_u8(4999), 9);
    fixture.assert_no_stale_lines();
}

#[test]
fn with_enforced_snooping_nothing_is_flushed_or_staged() {
    let machine = Machine::new(small()).unwrap();
    let (space, region) = (machine.staged_space(), region(AT, LEN));
    space.add(&region).unwrap();
    drop(space.buffer(4096).unwrap());
    space.remove(&region).unwrap();

    let SpaceStatistics { maps, staged, flushed_at_map, flushed_at_unmap, .. } = space.statistics();
    assert_eq!((maps, staged, flushed_at_map, flushed_at_unmap), (2, 0, 0, 0));
}
