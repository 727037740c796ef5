//! Short requests, and the list of free slots.

use std::sync::Arc;

use super::*;
use crate::memory::MemTable;

const RING: usize = 3;
const STATUS: Gpa = Gpa(0x1010);

fn short(head: u16, direction: Direction) -> ShortRequest {
    ShortRequest {
        pending_used: PendingUsed::new(Head::new(head, 1), Some(STATUS)),
        ring: RING,
        direction,
        block: 7,
        data: Span::new(Iova(0x8000), 0x1000).unwrap(),
        started: 11,
    }
}

/// Answers the status of a request of [`RING`].
fn answered(ring: usize, status: Gpa) -> bool {
    assert_eq!((ring, status), (RING, STATUS));
    true
}

/// A table of two slots, with a short request in the one that is returned.
fn table(direction: Direction) -> (InflightTable, u32) {
    let mut table = InflightTable::default();
    table.reserve(2);
    let vacancy = table.vacant();
    let index = vacancy.index();
    vacancy.occupy_short(short(5, direction));
    (table, index)
}

#[test]
fn a_short_request_is_removed_once() {
    let (mut table, index) = table(Direction::Write);

    assert_eq!(table.ring_of_short(index), Some(RING));
    let FinishedShort { head, direction, bytes } = table.remove_short(index, answered).unwrap();

    assert_eq!((head.id(), direction, bytes), (5, Direction::Write, 0x1000));
    assert!(table.remove_short(index, answered).is_none() && table.remove(index).is_none(), "it has been removed");
    for none in [index, u32::MAX - 1] {
        assert!(table.remove_short(none, answered).is_none() && table.ring_of_short(none).is_none(), "slot {none}");
    }
}

#[test]
fn a_short_request_whose_status_is_not_answered_stays() {
    let (mut table, index) = table(Direction::Read);

    assert!(table.remove_short(index, |_, _| false).is_none());

    assert_eq!(table.remove_short(index, answered).unwrap().head.id(), 5);
}

#[test]
fn a_short_request_that_is_looked_at_has_one_command_for_all_of_its_data() {
    for (direction, operation) in [(Direction::Read, Operation::Read), (Direction::Write, Operation::Write)] {
        let (mut table, index) = table(direction);

        let (request, data) = table.get(index).unwrap();

        assert_eq!((request.operation, request.block, request.bytes), (operation, 7, 0x1000));
        assert_eq!((request.position, request.outstanding, request.fully_submitted), (0x1000, 1, true));
        assert_eq!((request.ring, request.started), (RING, 11));
        assert_eq!(*data.buffers, [Span::new(Iova(0x8000), 0x1000).unwrap()]);
        assert!(table.ring_of_short(index).is_none(), "it is an ordinary one now");
        assert!(table.remove_short(index, answered).is_none(), "it is an ordinary one now");
        assert_eq!(table.remove(index).unwrap().0.pending_used.complete().id(), 5);
    }
}

#[test]
fn a_short_request_whose_command_was_not_submitted_has_none() {
    let (mut table, index) = table(Direction::Read);

    table.not_submitted(index);

    let (request, _) = table.get(index).unwrap();
    assert_eq!((request.position, request.outstanding, request.fully_submitted), (0, 0, false));
    table.remove(index).unwrap().0.pending_used.leave();
}

#[test]
fn a_short_request_uses_its_data_and_its_status_and_not_what_its_slot_held_before() {
    let (mut table, index) = table(Direction::Read);
    table.slots[index as usize].data.buffers.push(Span::new(Iova(0x2_0000), 0x1000).unwrap());
    let mut guest = GuestMemoryView::default();
    guest.publish(Arc::new(MemTable::default()));
    let used = |table: &InflightTable, start| table.uses(&guest, &[Span::new(Gpa(start), 1).unwrap()]);

    for (address, expected) in [(0x8fff, true), (0x1010, true), (0x9000, false), (0x2_0000, false)] {
        assert_eq!(used(&table, address), expected, "{address:#x}");
    }
    table.remove_short(index, answered).unwrap();
    assert!(!used(&table, 0x8fff), "it has ended");
}

#[test]
fn every_slot_is_free_until_it_is_occupied_and_again_after() {
    let mut table = InflightTable::default();
    table.reserve(3);
    for round in 0..2 {
        for head in 0..4 {
            table.vacant().occupy_short(short(head, Direction::Read));
        }
        let indices = table.indices();
        assert_eq!(indices, [0, 1, 2, 3], "a fourth slot has been added in round {round}");
        let heads: Vec<_> =
            indices.into_iter().map(|index| table.remove_short(index, answered).unwrap().head.id()).collect();
        assert!((0..4).all(|head| heads.contains(&head)), "{heads:?}");
        assert!(table.indices().is_empty());
    }
    assert_eq!(table.slots.len(), 4);
}
