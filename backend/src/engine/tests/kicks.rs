//! When a driver with EVENT_IDX kicks (virtio 1.2 §2.7.10), by the avail_event that a split ring writes.

use std::sync::Arc;

use super::bare::{region, setup};
use crate::engine::virtqueue::split::SplitRing;
use crate::engine::{Layout, VringSetup};
use crate::memory::MemTable;
use crate::sys::SharedMemory;

const USED: u64 = 0x2000;
const SIZE: u16 = 8;

/// A ring of which `base` requests have been taken, and its memory.
fn ring(base: u16) -> (SplitRing, SharedMemory) {
    let (region, _file) = region(0x4000);
    let memory = region.memory().clone();
    let table = MemTable::new(vec![Arc::new(region)]).unwrap();
    let areas = setup(Layout::Split, SIZE, [0, 0x1000, USED]);
    let setup = VringSetup { base: base.into(), event_idx: true, ..areas };
    (SplitRing::new(&setup, &table).unwrap(), memory)
}

/// Whether the driver kicks that adds `count` requests after `before`.
fn kicks(memory: &SharedMemory, before: u16, count: u16) -> bool {
    let event = memory.read_u16(USED as usize + 4 + 8 * usize::from(SIZE));
    let index = before.wrapping_add(count);
    index.wrapping_sub(event).wrapping_sub(1) < index.wrapping_sub(before)
}

#[test]
fn a_driver_kicks_a_worker_that_sleeps_and_not_one_that_a_completion_has_woken() {
    for base in [0, 7, u16::MAX] {
        let (ring, memory) = ring(base);
        for count in 1..=SIZE {
            ring.arm();
            assert!(kicks(&memory, base, count), "asleep, {count} after {base}");
            ring.disarm();
            assert!(!kicks(&memory, base, count), "awake, {count} after {base}");
        }
    }
}
