//! A second address space, for the front-end that comes next: what both have is pinned and mapped once.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::hardware::AddressSpace;
use vhost_device_vfio::memory::{Region, RegionSpec};

use super::{MIB, attach, memory, pinned};

const LOW: u64 = 0;
const HIGH: u64 = 0x1_0000_0000;
const BYTES: u64 = 8 * MIB;

/// The same memory, as two processes share it: each has its own descriptor and its own view.
fn shared_by_two(gpa: u64) -> [Arc<Region>; 2] {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
    ftruncate(&file, BYTES).unwrap();
    [file.try_clone().unwrap(), file].map(|file| {
        let gpa = Span::new(Gpa(gpa), BYTES).unwrap();
        let spec = RegionSpec { gpa, qva: Qva(0x7f00_0000_0000), offset: 0, file: file.into() };
        Arc::new(Region::map(spec).unwrap())
    })
}

#[test]
fn the_same_memory_is_pinned_and_mapped_once() {
    let (space, _function) = attach().unwrap();
    let [mine, next] = shared_by_two(LOW);
    space.add(&mine).unwrap();
    let second = space.second().unwrap();
    let (before, maps, mapped) = (pinned(), space.statistics().maps, space.statistics().mapped);

    second.space().add(&next).unwrap();
    second.exchange().unwrap();
    second.space().remove(&mine).unwrap();

    assert_eq!((pinned(), space.statistics().maps, space.statistics().mapped), (before, maps, mapped));
    space.remove(&next).unwrap();
    assert_eq!(before - pinned(), BYTES);
}

#[test]
fn what_the_first_unmaps_stays_pinned_for_the_next() {
    let (space, _function) = attach().unwrap();
    let [mine, next] = shared_by_two(LOW);
    space.add(&mine).unwrap();
    let second = space.second().unwrap();
    second.space().add(&next).unwrap();
    let before = pinned();

    space.remove(&mine).unwrap();
    let kept = pinned();
    second.exchange().unwrap();

    assert_eq!((kept, pinned()), (before, before));
    space.remove(&next).unwrap();
    assert_eq!(before - pinned(), BYTES);
}

#[test]
fn memory_of_which_the_next_has_only_a_part_is_exchanged_and_the_rest_is_not_reachable_then() {
    let (space, _function) = attach().unwrap();
    let ([mine, next], only_mine) = (shared_by_two(LOW), memory(HIGH, BYTES));
    space.add(&mine).unwrap();
    space.add(&only_mine).unwrap();
    let second = space.second().unwrap();
    second.space().add(&next).unwrap();
    let before = pinned();

    second.exchange().unwrap();
    let free = space.add(&memory(HIGH, BYTES));

    assert!(free.is_ok(), "nothing is mapped there: {free:?}");
    second.space().remove(&mine).unwrap();
    second.space().remove(&only_mine).unwrap();
    assert_eq!(pinned(), before);
}

#[test]
fn what_is_borrowed_is_not_confused_with_what_the_first_maps_there_later() {
    let (space, _function) = attach().unwrap();
    let ([mine, next], other) = (shared_by_two(LOW), memory(LOW, BYTES));
    space.add(&mine).unwrap();
    let second = space.second().unwrap();
    second.space().add(&next).unwrap();
    let before = pinned();

    space.remove(&mine).unwrap();
    space.add(&other).unwrap();
    assert_eq!(pinned() - before, BYTES, "both are pinned");
    second.exchange().unwrap();
    second.space().remove(&other).unwrap();

    assert_eq!(pinned(), before);
    space.remove(&next).unwrap();
    assert_eq!(before - pinned(), BYTES);
}

#[test]
fn memory_of_the_next_alone_is_pinned_for_it_and_unpinned_when_it_leaves() {
    let (space, _function) = attach().unwrap();
    let [mine, next] = shared_by_two(LOW);
    space.add(&mine).unwrap();
    let second = space.second().unwrap();
    let (before, other) = (pinned(), memory(HIGH, BYTES));

    second.space().add(&next).unwrap();
    second.space().add(&other).unwrap();
    let both = pinned();
    second.space().remove(&next).unwrap();
    second.space().remove(&other).unwrap();

    assert_eq!((both - before, pinned()), (BYTES, before));
    drop(second);
    space.remove(&mine).unwrap();
    assert_eq!(before - pinned(), BYTES);
}
