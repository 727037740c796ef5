//! Records in which a front-end has changed some bytes, or all. Recovery ends without a panic, and what it resumes is consistent.

use std::cell::Cell;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::super::packed::PackedMarks;
use super::super::packed_recovery::PackedState;
use super::super::split::SplitMarks;
use super::super::split_recovery::SplitState;
use super::super::{Contradiction, InflightRegion, Recorded};
use super::memory;
use crate::engine::Layout;
use crate::engine::virtqueue::position::Position;
use crate::sys::SharedMemory;

const SIZE: u16 = 4;
const BASE: Position = Position { slot: 0, wrap: true };

/// Offsets and values that are written over a record. Mostly small values, so that many records are nearly right.
fn changes(bytes: usize) -> impl Strategy<Value = Vec<(usize, u16)>> {
    let value = || prop_oneof![4 => 0_u16..6, 1 => any::<u16>()];
    let change = move || (0..bytes / 2, value()).prop_map(|(at, value)| (2 * at, value));
    prop_oneof![8 => vec(change(), 0..4), 1 => vec(change(), bytes)]
}

/// A region with `changes` to the record that `write` makes.
fn region(layout: Layout, write: impl FnOnce(&InflightRegion), changes: &[(usize, u16)]) -> InflightRegion {
    let memory: SharedMemory = memory(&[]);
    let region = InflightRegion::new(memory.clone(), layout, SIZE).unwrap();
    write(&region);
    changes.iter().for_each(|&(at, value)| memory.write_u16(at, value));
    region
}

/// Takes entries 0 to 3, and publishes 1 and 3.
fn write_split(region: &InflightRegion) {
    let ring = SplitState { size: SIZE, used_idx: 0, avail_idx: 0, base: 0 };
    let (mut marks, _) = SplitMarks::start(region, &ring).unwrap().unwrap();
    (0..4).for_each(|head| marks.take(head));
    [1, 3].iter().for_each(|&head| marks.push(head));
    marks.before_publish();
    marks.after_publish(2);
}

/// Takes chains of 1, 1 and 2 descriptors, and publishes the second.
fn write_packed(region: &InflightRegion) {
    let ring = |_| PackedState { size: SIZE, old_used_flags: 0, base: Some(BASE) };
    let (mut marks, _) = PackedMarks::start(region, ring).unwrap().unwrap();
    let taken = [&[0_u64][..], &[0], &[1, 0]].map(|descriptors| {
        let len = u16::try_from(descriptors.len()).unwrap();
        descriptors.iter().fold(marks.next_entry(), |entry, flags| marks.note(entry, [0, flags << 48]));
        marks.take(len)
    });
    marks.push(taken[1]);
    marks.before_publish(Position { slot: 1, wrap: true });
    marks.after_publish();
}

/// Counts what happens, so that the test notices if nothing is ever resumed, or ever refused.
#[derive(Default)]
struct Outcomes {
    resumed: Cell<u32>,
    refused: Cell<u32>,
}

impl Outcomes {
    fn of<T>(&self, result: Result<Option<T>, Contradiction>) -> Option<T> {
        let counter = if result.is_ok() { &self.resumed } else { &self.refused };
        counter.set(counter.get() + 1);
        result.ok().flatten()
    }

    fn check(&self) {
        assert!(self.resumed.get() > 100 && self.refused.get() > 100);
    }
}

fn runner() -> TestRunner {
    TestRunner::new(Config { cases: 5000, failure_persistence: None, ..Config::default() })
}

/// True if no two are equal.
fn distinct(mut values: Vec<u16>) -> bool {
    values.sort_unstable();
    values.is_sorted_by(|one, next| one < next)
}

#[test]
fn a_hostile_split_record_is_refused_or_resumed_consistently() {
    let outcomes = Outcomes::default();
    let ring = (prop_oneof![4 => Just(2_u16), 1 => 0_u16..6, 1 => any::<u16>()], 2_u16..5, 0_u16..4);
    let test = |(changes, (used_idx, offered, ahead)): (Vec<_>, (u16, u16, u16))| {
        let region = region(Layout::Split, write_split, &changes);
        let [avail_idx, base] = [offered, ahead].map(|count| used_idx.wrapping_add(count));
        let state = SplitState { size: SIZE, used_idx, avail_idx, base };
        if let Some((mut marks, plan)) = outcomes.of(SplitMarks::start(&region, &state)) {
            prop_assert!(plan.requests.iter().all(|&head| head < SIZE));
            prop_assert!(plan.requests.len() <= offered.into());
            prop_assert_eq!(usize::from(plan.next_avail.wrapping_sub(used_idx)), plan.requests.len());
            prop_assert!(distinct([plan.requests, plan.published].concat()));
            (0..SIZE).for_each(|head| marks.take(head));
        }
        Ok(())
    };
    runner().run(&(changes(80), ring), test).unwrap();
    outcomes.check();
}

#[test]
fn a_hostile_packed_record_is_refused_or_resumed_consistently() {
    let outcomes = Outcomes::default();
    let flags = prop_oneof![Just(0x80_u16), Just(0x8080), any::<u16>()];
    let test = |(changes, old_used_flags): (Vec<_>, u16)| {
        let region = region(Layout::Packed, write_packed, &changes);
        let ring = |_| PackedState { size: SIZE, old_used_flags, base: Some(BASE) };
        if let Some((mut marks, plan)) = outcomes.of(PackedMarks::start(&region, ring)) {
            let descriptors: usize = plan.requests.iter().map(|request| request.descriptors.len()).sum();
            prop_assert!(descriptors == usize::from(plan.taken) && plan.taken <= SIZE && plan.used.slot < SIZE);
            prop_assert!(distinct(plan.requests.iter().map(|request| request.entry).collect()));
            // As many as are free can be taken, and all can be returned.
            let mut chains: Vec<_> = plan.requests.iter().map(|request| Recorded::without_end(request.entry)).collect();
            for _ in plan.taken..SIZE {
                marks.note(marks.next_entry(), [0; 2]);
                chains.push(marks.take(1));
            }
            prop_assert!(distinct(chains.iter().map(|chain| chain.first()).collect()));
            chains.into_iter().for_each(|chain| marks.push(chain));
            marks.before_publish(BASE);
            marks.after_publish();
        }
        Ok(())
    };
    runner().run(&(changes(160), flags), test).unwrap();
    outcomes.check();
}
