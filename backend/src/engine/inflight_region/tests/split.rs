//! Split rings, from the text of the protocol alone.

use super::super::split::SplitMarks;
use super::super::split_recovery::*;
use super::super::{Claim, Contradiction, InflightRegion};
use super::memory;
use crate::engine::Layout;

const SIZE: u16 = 4;

/// A ring whose used.idx is 10 and avail.idx is 14, at the base that QEMU sets.
const RING: SplitState = SplitState { size: SIZE, used_idx: 10, avail_idx: 14, base: 10 };

/// Used index 10, with entries 2 and 0 in flight, taken in this order.
fn record() -> SplitRecord {
    let entry = |inflight, counter| SplitEntry { inflight, next: 0, counter };
    let entries = vec![entry(1, 8), entry(0, 6), entry(1, 7), entry(0, 5)];
    SplitRecord { features: 0, version: 1, desc_num: SIZE, last_batch_head: 3, used_idx: 10, entries }
}

fn resumed(record: &SplitRecord, ring: &SplitState) -> SplitPlan {
    match recover(record, SIZE, ring) {
        Ok(SplitRecovery::Resume(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

fn refused(record: &SplitRecord, ring: &SplitState) -> Claim {
    match recover(record, SIZE, ring) {
        Err(Contradiction(claim)) => claim,
        other => panic!("{other:?}"),
    }
}

#[test]
fn marked_requests_are_submitted_again_in_the_order_of_their_counters() {
    let plan = resumed(&record(), &RING);
    assert_eq!(plan, SplitPlan { published: vec![], requests: vec![2, 0], next_avail: 12, next_counter: 9 });
}

#[test]
fn a_batch_that_has_been_published_is_not_submitted_again() {
    let mut record = record();
    (record.last_batch_head, record.entries[0].next) = (0, 2);

    let one = resumed(&record, &SplitState { used_idx: 11, base: 11, ..RING });
    let both = resumed(&record, &SplitState { used_idx: 12, base: 12, ..RING });

    assert_eq!(one, SplitPlan { published: vec![0], requests: vec![2], next_avail: 12, next_counter: 8 });
    assert_eq!(both, SplitPlan { published: vec![0, 2], requests: vec![], next_avail: 12, next_counter: 0 });
}

#[test]
fn indices_wrap_around() {
    let record = SplitRecord { used_idx: 0xffff, ..record() };
    let ring = SplitState { size: SIZE, used_idx: 0, avail_idx: 3, base: 0 };
    assert_eq!(resumed(&SplitRecord { last_batch_head: 1, ..record }, &ring).next_avail, 2);
}

#[test]
fn a_base_is_believed_from_the_used_to_the_available_index() {
    for base in 10..=14 {
        assert_eq!(resumed(&record(), &SplitState { base, ..RING }).next_avail, 12, "{base}");
    }
    for base in [9, 15, 0, 0x8000] {
        let claim = refused(&record(), &SplitState { base, ..RING });
        assert_eq!(claim, Claim::Base { base, used: 10, avail: 14 });
    }
}

#[test]
fn a_new_record_is_used_if_nothing_can_be_in_flight() {
    let new = SplitRecord { version: 0, ..record() };
    assert_eq!(recover(&new, SIZE, &RING), Ok(SplitRecovery::Fresh));
    assert_eq!(recover(&new, SIZE, &SplitState { base: 11, ..RING }), Ok(SplitRecovery::Unknown));
}

#[test]
fn a_record_without_marks_does_not_bind_a_ring_that_starts_anew() {
    let mut record = record();
    record.entries.iter_mut().for_each(|entry| entry.inflight = 0);
    let anew = SplitState { size: SIZE, used_idx: 0, avail_idx: 0, base: 0 };
    assert_eq!(recover(&record, SIZE, &anew), Ok(SplitRecovery::Fresh));
    record.entries[1].inflight = 1;
    assert_eq!(refused(&record, &anew), Claim::UsedIndex { recorded: 10, used: 0, size: SIZE });
}

#[test]
fn each_contradiction_is_named() {
    type Change = fn(&mut SplitRecord, &mut SplitState);
    let cases: [(Change, Claim); 10] = [
        (|record, _| record.version = 2, Claim::Format { version: 2, features: 0 }),
        (|record, _| record.features = 1, Claim::Format { version: 1, features: 1 }),
        (|record, _| record.desc_num = 8, Claim::Entries { found: 8, entries: SIZE }),
        (|record, _| record.used_idx = 5, Claim::UsedIndex { recorded: 5, used: 10, size: SIZE }),
        (|record, _| (record.used_idx, record.last_batch_head) = (9, 4), Claim::Batch(4)),
        // Entry 3 links to entry 0, and that to itself.
        (|record, _| record.used_idx = 7, Claim::Batch(0)),
        (|record, _| record.entries[3].inflight = 2, Claim::Mark { entry: 3, mark: 2 }),
        (|_, ring| ring.size = 2, Claim::Head { entry: 2, size: 2 }),
        (|record, _| record.entries[0].counter = 7, Claim::Counter { entry: 2, counter: 7 }),
        (|_, ring| ring.avail_idx = 11, Claim::Count { marked: 2, available: 1 }),
    ];
    for (change, claim) in cases {
        let (mut record, mut ring) = (record(), RING);
        change(&mut record, &mut ring);
        match claim {
            // Which of the two is named depends on the sorting.
            Claim::Counter { counter, .. } => {
                assert!(matches!(refused(&record, &ring), Claim::Counter { counter: found, .. } if found == counter));
            }
            claim => assert_eq!(refused(&record, &ring), claim),
        }
    }
    let mut record = record();
    record.entries[0].counter = u64::MAX;
    assert_eq!(refused(&record, &RING), Claim::Counter { entry: 0, counter: u64::MAX });
}

/// `QueueRegionSplit` with two entries, byte by byte: entry 1 has been published, and entry 0 is in flight.
#[rustfmt::skip]
const BYTES: [u8; 48] = [
    0, 0, 0, 0, 0, 0, 0, 0, // features
    1, 0, // version
    2, 0, // desc_num
    1, 0, // last_batch_head
    6, 0, // used_idx
    1, 0, 0, 0, 0, 0, 0, 0, // inflight, padding, next
    9, 0, 0, 0, 0, 0, 0, 0, // counter
    1, 0, 0, 0, 0, 0, 1, 0, // the same of entry 1
    8, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn the_bytes_of_another_writer_are_understood_and_continued() {
    let memory = memory(&BYTES);
    let region = InflightRegion::new(memory.clone(), Layout::Split, 2).unwrap();
    let ring = SplitState { size: 2, used_idx: 7, avail_idx: 8, base: 7 };

    let (mut marks, plan) = SplitMarks::start(&region, &ring).unwrap().unwrap();
    assert_eq!((plan.published, plan.requests), (vec![1], vec![0]));
    marks.take(1);
    marks.push(1);
    marks.push(0);
    marks.before_publish();
    marks.after_publish(9);

    #[rustfmt::skip]
    let expected = [
        0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 2, 0, 0, 0, 9, 0, // the batch ends with entry 0, and used_idx is 9
        0, 0, 0, 0, 0, 0, 1, 0, // entry 0 was pushed after entry 1
        9, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,
        10, 0, 0, 0, 0, 0, 0, 0, // one more than that of entry 0
    ];
    let mut bytes = [0; 48];
    memory.copy_to(0, &mut bytes);
    assert_eq!(bytes, expected);
}
