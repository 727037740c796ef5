//! Packed rings, from the text of the protocol alone.

use super::super::packed::PackedMarks;
use super::super::packed_layout::at;
use super::super::packed_recovery::*;
use super::super::{Claim, Contradiction, InflightRegion, Recorded};
use super::memory;
use crate::engine::Layout;
use crate::engine::virtqueue::position::Position;

const SIZE: u16 = 4;
const NEXT: u16 = 1;

/// Flags of a descriptor in a round with wrap counter 1: available, and used.
const AVAILABLE: u16 = 0x80;
const USED: u16 = 0x8080;

const BASE: Position = Position { slot: 0, wrap: true };
const RING: PackedState = PackedState { size: SIZE, old_used_flags: AVAILABLE, base: Some(BASE) };

/// Four requests have been taken, of one descriptor except for the third, and the second has been returned. In flight: entry 0,
/// and entries 2 and 3. The used position is 1.
fn record() -> PackedRecord {
    let entry = PackedEntry::default();
    let entries = vec![
        PackedEntry { inflight: 1, next: 1, last: 0, num: 1, counter: 3, id: 7, flags: AVAILABLE, ..entry },
        PackedEntry { inflight: 0, next: 4, last: 1, num: 1, counter: 4, ..entry },
        PackedEntry { inflight: 1, next: 3, last: 3, num: 2, counter: 2, flags: AVAILABLE | NEXT, addr: 5, ..entry },
        PackedEntry { next: 4, id: 9, flags: AVAILABLE | 2, len: 8, addr: 6, ..entry },
    ];
    PackedRecord {
        features: 0,
        version: 1,
        desc_num: SIZE,
        free_head: 1,
        old_free_head: 1,
        used_idx: 1,
        old_used_idx: 1,
        used_wrap_counter: 1,
        old_used_wrap_counter: 1,
        entries,
    }
}

/// The last publication has returned entry 1, and the record has not been brought up to it.
fn during_publication() -> PackedRecord {
    let mut record = PackedRecord { old_free_head: 4, old_used_idx: 0, ..record() };
    record.entries[1].inflight = 1;
    record
}

fn resumed(record: &PackedRecord, ring: &PackedState) -> PackedPlan {
    match recover(record, SIZE, ring) {
        Ok(PackedRecovery::Resume(plan)) => plan,
        other => panic!("{other:?}"),
    }
}

fn refused(record: &PackedRecord, ring: &PackedState) -> Claim {
    match recover(record, SIZE, ring) {
        Err(Contradiction(claim)) => claim,
        other => panic!("{other:?}"),
    }
}

fn heads(plan: &PackedPlan) -> Vec<u16> {
    plan.requests.iter().map(|request| request.entry).collect()
}

#[test]
fn marked_requests_are_submitted_again_in_the_order_of_their_counters_with_their_descriptors() {
    let plan = resumed(&record(), &RING);

    assert_eq!(heads(&plan), [2, 0]);
    let word = |id: u64, flags: u16, len: u64| len | id << 32 | u64::from(flags) << 48;
    assert_eq!(plan.requests[0].descriptors, [[5, word(0, AVAILABLE | NEXT, 0)], [6, word(9, AVAILABLE | 2, 8)]]);
    assert_eq!((plan.used, plan.taken, plan.next_counter), (Position { slot: 1, wrap: true }, 3, 4));
    assert_eq!((plan.free_head, plan.completed, plan.stale), (1, false, vec![]));
}

#[test]
fn a_publication_that_the_driver_can_see_is_completed() {
    // Used; and made available again in the next round.
    for flags in [USED, 0x8000] {
        let plan = resumed(&during_publication(), &PackedState { old_used_flags: flags, ..RING });
        assert_eq!((plan.completed, plan.free_head, plan.stale.as_slice()), (true, 1, &[1][..]));
        assert_eq!((heads(&plan), plan.used), (vec![2, 0], Position { slot: 1, wrap: true }));
    }
}

#[test]
fn a_publication_that_the_driver_cannot_see_is_rolled_back() {
    let plan = resumed(&during_publication(), &RING);
    assert_eq!((plan.completed, plan.free_head, plan.stale.as_slice()), (false, 4, &[][..]));
    assert_eq!((heads(&plan), plan.used), (vec![2, 0, 1], BASE));
}

#[test]
fn a_publication_of_the_whole_ring_is_known_by_its_wrap_counter() {
    let entry = |next| PackedEntry { inflight: 1, next, num: 1, counter: next.into(), ..PackedEntry::default() };
    let entries = vec![
        PackedEntry { last: 0, next: 4, ..entry(0) },
        PackedEntry { last: 1, ..entry(0) },
        PackedEntry { last: 2, ..entry(1) },
        PackedEntry { last: 3, ..entry(2) },
    ];
    let record = PackedRecord { free_head: 3, old_free_head: 4, used_idx: 0, old_used_idx: 0, entries, ..record() };
    let record = PackedRecord { used_wrap_counter: 0, ..record };
    let plan = resumed(&record, &PackedState { old_used_flags: USED, ..RING });
    assert_eq!((plan.completed, plan.taken, plan.used), (true, 0, Position { slot: 0, wrap: false }));
    assert_eq!(plan.stale, [3, 2, 1, 0]);
}

#[test]
fn a_request_that_has_not_left_the_free_entries_has_not_been_taken() {
    let mut record = record();
    record.entries[1].inflight = 1;
    let plan = resumed(&record, &RING);
    assert_eq!((heads(&plan), plan.stale.as_slice(), plan.taken), (vec![2, 0], &[1][..], 3));
}

#[test]
fn a_new_record_is_used_if_nothing_can_be_in_flight() {
    let new = PackedRecord { version: 0, ..record() };
    assert_eq!(recover(&new, SIZE, &RING), Ok(PackedRecovery::Fresh(BASE)));
    assert_eq!(recover(&new, SIZE, &PackedState { base: None, ..RING }), Ok(PackedRecovery::Unknown));
}

#[test]
fn each_contradiction_is_named() {
    type Change = fn(&mut PackedRecord);
    let cases: [(Change, Claim); 13] = [
        (|record| record.version = 2, Claim::Format { version: 2, features: 0 }),
        (|record| record.features = 1, Claim::Format { version: 1, features: 1 }),
        (|record| record.desc_num = 8, Claim::Entries { found: 8, entries: SIZE }),
        (|record| record.used_idx = 4, Claim::Position { slot: 4, wrap: 1, size: SIZE }),
        (|record| record.old_used_wrap_counter = 2, Claim::Position { slot: 1, wrap: 2, size: SIZE }),
        (|record| record.entries[1].next = 1, Claim::Free(1)),
        (|record| record.entries[3].inflight = 9, Claim::Mark { entry: 3, mark: 9 }),
        (|record| record.entries[2].num = 0, Claim::Chain { head: 2, entry: 2 }),
        (|record| record.entries[2].num = 1, Claim::Chain { head: 2, entry: 2 }),
        (|record| record.entries[2].last = 2, Claim::Chain { head: 2, entry: 3 }),
        (|record| record.entries[2].next = 2, Claim::Chain { head: 2, entry: 2 }),
        (|record| record.entries[2].inflight = 0, Claim::Leaked(2)),
        (|record| record.entries[0].counter = 2, Claim::Counter { entry: 2, counter: 2 }),
    ];
    for (change, claim) in cases {
        let mut record = record();
        change(&mut record);
        match claim {
            // Which of the two is named depends on the sorting.
            Claim::Counter { counter, .. } => {
                assert!(matches!(refused(&record, &RING), Claim::Counter { counter: found, .. } if found == counter));
            }
            claim => assert_eq!(refused(&record, &RING), claim),
        }
    }
    let mut record = during_publication();
    record.used_idx = 2;
    let published = PackedState { old_used_flags: USED, ..RING };
    assert_eq!(refused(&record, &published), Claim::Freed { advanced: 2, free_head: 1, old: 4 });
}

/// `QueueRegionPacked` with two entries, byte by byte: entry 0 is in flight.
#[rustfmt::skip]
const BYTES: [u8; 96] = [
    0, 0, 0, 0, 0, 0, 0, 0, // features
    1, 0, // version
    2, 0, // desc_num
    1, 0, 1, 0, // free_head, old_free_head
    1, 0, 1, 0, // used_idx, old_used_idx
    1, 1, // used_wrap_counter, old_used_wrap_counter
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // padding, alignment
    1, 0, // inflight, padding
    1, 0, 0, 0, 1, 0, // next, last, num
    4, 0, 0, 0, 0, 0, 0, 0, // counter
    0x34, 0x12, 0x80, 0x00, // id, flags
    0, 2, 0, 0, // len
    0, 0, 0, 1, 0, 0, 0, 0, // addr
    0, 0, 2, 0, 0, 0, 0, 0, // the same of entry 1
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

#[test]
fn the_bytes_of_another_writer_are_understood_and_continued() {
    let memory = memory(&BYTES);
    let region = InflightRegion::new(memory.clone(), Layout::Packed, 2).unwrap();
    let ring = |slot| {
        assert_eq!(slot, 1);
        PackedState { size: 2, ..RING }
    };

    let (mut marks, plan) = PackedMarks::start(&region, ring).unwrap().unwrap();
    assert_eq!(plan.requests, [PackedRequest { entry: 0, descriptors: vec![[0x100_0000, 0x80_1234 << 32 | 0x200]] }]);
    let taken = marks.next_entry();
    marks.note(taken, [0x200_0000, 0x80_5678 << 32 | 0x400]);
    marks.take(1);
    marks.push(Recorded::without_end(0));
    marks.before_publish(Position { slot: 0, wrap: false });
    marks.after_publish();

    #[rustfmt::skip]
    let expected = [
        0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 2, 0, 0, 0, 0, 0, // entry 0 is free
        0, 0, 0, 0, 0, 0, 0, 0, // in the next round
        0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 2, 0, 0, 0, 1, 0, // the end of the free entries
        4, 0, 0, 0, 0, 0, 0, 0, 0x34, 0x12, 0x80, 0x00, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0,
        1, 0, 2, 0, 1, 0, 1, 0, // entry 1 is in flight
        5, 0, 0, 0, 0, 0, 0, 0, 0x78, 0x56, 0x80, 0x00, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0,
    ];
    let mut bytes = [0; 96];
    memory.copy_to(0, &mut bytes);
    assert_eq!((taken, bytes), (1, expected));
}

/// Seven free entries, in a record that has just been initialized.
fn new_marks() -> (InflightRegion, PackedMarks) {
    let bytes = InflightRegion::bytes(Layout::Packed, 7);
    let region = InflightRegion::new(memory(&vec![0; bytes]), Layout::Packed, 7).unwrap();
    let (marks, _) = PackedMarks::start(&region, |_| PackedState { size: 7, ..RING }).unwrap().unwrap();
    (region, marks)
}

fn recovered(region: &InflightRegion) -> (PackedMarks, PackedPlan) {
    PackedMarks::start(region, |_| PackedState { size: 7, base: None, ..RING }).unwrap().unwrap()
}

fn chain_of_three(addr: u64) -> [[u64; 2]; 3] {
    let rest = |flags: u16| u64::from(AVAILABLE | flags) << 48;
    [[addr, rest(NEXT)], [addr + 1, rest(NEXT)], [addr + 2, rest(0)]]
}

fn publish(marks: &mut PackedMarks, chains: &[Recorded], slot: u16) {
    chains.iter().for_each(|&chain| marks.push(chain));
    marks.before_publish(Position { slot, wrap: true });
    marks.after_publish();
}

#[test]
fn a_chain_is_recorded_in_free_entries_wherever_they_are() {
    let (region, mut marks) = new_marks();
    let taken = [1, 2, 3].map(|addr| marks.take_neighbours(&[[addr, u64::from(AVAILABLE) << 48]]).unwrap());
    publish(&mut marks, &[taken[1], taken[0]], 2);

    assert_eq!(marks.take_neighbours(&chain_of_three(8)), None);
    let first = marks.next_entry();
    chain_of_three(8).into_iter().fold(first, |entry, descriptor| marks.note(entry, descriptor));
    assert_eq!(marks.take(3).first(), 1);
    assert_eq!(marks.take_neighbours(&chain_of_three(16)).map(Recorded::first), Some(4));

    let (_, plan) = recovered(&region);
    let taken: Vec<_> = plan.requests.iter().map(|request| (request.entry, request.descriptors.clone())).collect();
    let single = vec![[3, u64::from(AVAILABLE) << 48]];
    assert_eq!(taken, [(2, single), (1, chain_of_three(8).to_vec()), (4, chain_of_three(16).to_vec())]);
    assert_eq!((plan.free_head, plan.taken), (7, 7));
}

#[test]
fn a_recovered_chain_is_freed_whole_whatever_follows_its_last_entry() {
    let (region, mut marks) = new_marks();
    marks.take_neighbours(&chain_of_three(8)).unwrap();
    // Another writer's last entry has the second as its successor.
    region.memory.write_u16(at(2) + 2, 1);

    let (mut marks, _) = recovered(&region);
    publish(&mut marks, &[Recorded::without_end(0)], 3);

    let (_, plan) = recovered(&region);
    assert_eq!((plan.free_head, plan.taken), (0, 0));
}

#[test]
fn a_chain_that_stays_in_the_ring_leaves_the_record_as_it_was() {
    let (region, mut marks) = new_marks();
    let taken = marks.take_neighbours(&chain_of_three(8)).unwrap();
    let left = marks.take_neighbours(&chain_of_three(16)).unwrap();
    marks.untake(left);
    let mark = region.memory.read_u16(at(left.first()));
    marks.note(marks.next_entry(), [24, u64::from(AVAILABLE) << 48]);
    let next = marks.take(1);

    let (_, plan) = recovered(&region);

    let entries: Vec<_> = plan.requests.iter().map(|request| request.entry).collect();
    assert_eq!((entries, plan.stale.len(), plan.next_counter), (vec![taken.first(), next.first()], 0, 2));
    assert_eq!((mark, next.first(), plan.taken, plan.free_head), (0, 3, 4, 4));
}
