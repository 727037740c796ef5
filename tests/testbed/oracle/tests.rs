//! The oracle finds each kind of error, on a disk that makes it on purpose.

#![expect(clippy::cast_possible_truncation, reason = "a small disk")]

use super::*;

const BLOCKS: u64 = 32;

/// A disk that executes operations at once.
struct Disk {
    oracle: Oracle,
    bytes: Vec<u8>,
    slot: u16,
}

/// A completed operation whose used entry the oracle has not seen.
struct Done {
    operation: Operation,
    completion: Completion,
    data: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        Self { oracle: Oracle::new(BLOCKS, 1), bytes: vec![0; BLOCKS as usize * BLOCK], slot: 0 }
    }

    /// Plans and submits until an operation of the wanted kind comes, and completes the others.
    fn submit(&mut self, wanted: impl Fn(Operation) -> bool) -> Operation {
        loop {
            let Some(operation) = self.oracle.plan(0) else { continue };
            self.slot += 1;
            self.oracle.submitted(Tag { queue: 0, slot: self.slot }, operation);
            if wanted(operation) {
                return operation;
            }
            self.execute(operation);
            let done = self.done(operation);
            self.report(&done).unwrap();
        }
    }

    fn write(&mut self) -> Operation {
        self.submit(|operation| matches!(operation, Operation::Write(..)))
    }

    fn range(operation: Operation) -> std::ops::Range<usize> {
        let start = operation.extent().map_or(0, |extent| extent.first as usize * BLOCK);
        start..start + operation.bytes()
    }

    fn execute(&mut self, operation: Operation) {
        if let Operation::Write(..) = operation {
            self.bytes[Self::range(operation)].copy_from_slice(&operation.data());
        }
    }

    /// The completion of the operation that was submitted last.
    fn done(&self, operation: Operation) -> Done {
        let completion = Completion { slot: self.slot, status: 0, written: operation.written() };
        Done { operation, completion, data: self.bytes[Self::range(operation)].to_vec() }
    }

    fn report(&mut self, done: &Done) -> Result<(), Wrong> {
        assert_eq!(done.data.len(), done.operation.bytes());
        self.oracle.completed(0, done.completion, &done.data)
    }

    /// Writes once, as a good disk does.
    fn good_write(&mut self) -> Operation {
        let operation = self.write();
        self.execute(operation);
        let done = self.done(operation);
        self.report(&done).unwrap();
        operation
    }

    /// Reads every block.
    fn scan(&mut self) -> Result<(), Wrong> {
        self.oracle.start_scan();
        while let Some(operation) = self.oracle.plan(0) {
            self.slot += 1;
            self.oracle.submitted(Tag { queue: 0, slot: self.slot }, operation);
            let done = self.done(operation);
            self.report(&done)?;
        }
        Ok(())
    }

    /// Two writes to the same blocks, the second submitted when the first had been reported.
    fn write_again(&mut self) -> [Operation; 2] {
        let mut last = self.good_write();
        loop {
            let next = self.good_write();
            if next.extent() == last.extent() {
                return [last, next];
            }
            last = next;
        }
    }
}

#[test]
fn a_good_disk_is_never_wrong_and_keeps_its_content_over_a_death() {
    let mut disk = Disk::new();
    for _ in 0..20 {
        for _ in 0..100 {
            disk.good_write();
        }
        disk.oracle.server_died();
    }

    disk.scan().unwrap();

    assert_eq!(disk.oracle.lost(), []);
    assert!(disk.oracle.completions() > 2000);
}

#[test]
fn a_request_that_never_completes_is_lost() {
    let mut disk = Disk::new();
    let operation = disk.write();
    disk.oracle.server_died();

    let lost = disk.oracle.lost();

    assert_eq!(disk.oracle.old_in_flight(), 1);
    assert_eq!(lost, [Wrong::Lost(Tag { queue: 0, slot: disk.slot }, operation)]);
}

#[test]
fn a_second_completion_is_doubled() {
    let mut disk = Disk::new();
    let operation = disk.good_write();
    let again = disk.done(operation);

    let wrong = disk.report(&again);

    assert_eq!(wrong, Err(Wrong::Doubled(Tag { queue: 0, slot: disk.slot })));
}

#[test]
fn an_old_write_done_again_after_a_later_one_was_read_is_reordered() {
    let mut disk = Disk::new();
    let [first, _] = disk.write_again();
    disk.scan().unwrap();
    disk.execute(first);

    let wrong = disk.scan();

    assert!(matches!(wrong, Err(Wrong::Reordered(_))), "{wrong:?}");
}

#[test]
fn an_old_write_done_again_is_stale_even_if_the_later_one_was_never_read() {
    let mut disk = Disk::new();
    let [first, _] = disk.write_again();
    disk.execute(first);

    let wrong = disk.scan();

    assert!(matches!(wrong, Err(Wrong::Stale(_))), "{wrong:?}");
}

#[test]
fn a_write_that_was_reported_but_never_done_is_stale() {
    let mut disk = Disk::new();
    let operation = disk.write();
    let done = disk.done(operation);
    disk.report(&done).unwrap();

    let wrong = disk.scan();

    assert!(matches!(wrong, Err(Wrong::Stale(Content { found: Some(Stamp { sequence: 0, .. }), .. }))), "{wrong:?}");
}

#[test]
fn parts_of_two_writes_and_changed_bytes_are_torn() {
    for changed in [512..4096, 700..701, 4095..4096] {
        let mut disk = Disk::new();
        let [first, second] = disk.write_again();
        let at = Disk::range(second).start;
        let old = first.data();
        for byte in changed.clone() {
            disk.bytes[at + byte] = if changed.len() == 1 { !disk.bytes[at + byte] } else { old[byte] };
        }

        let wrong = disk.scan();

        assert!(matches!(wrong, Err(Wrong::Torn(_))), "{changed:?}: {wrong:?}");
    }
}

#[test]
fn a_write_to_other_blocks_is_misplaced() {
    let mut disk = Disk::new();
    let operation = disk.good_write();
    let from = Disk::range(operation).start;
    let to = (from + BLOCK * LARGEST as usize) % disk.bytes.len();
    disk.bytes.copy_within(from..from + BLOCK, to);

    let wrong = disk.scan();

    assert!(matches!(wrong, Err(Wrong::Misplaced(_))), "{wrong:?}");
}

#[test]
fn a_read_that_leaves_its_buffer_alone_is_torn() {
    let mut disk = Disk::new();
    disk.good_write();
    let read = disk.submit(|operation| matches!(operation, Operation::Read(_)));
    let done = Done { data: read.data(), ..disk.done(read) };

    let wrong = disk.report(&done);

    assert!(matches!(wrong, Err(Wrong::Torn(_))), "{wrong:?}");
}

#[test]
fn an_error_status_and_a_wrong_length_are_found() {
    for (status, more) in [(1, 0), (255, 0), (0, 1)] {
        let mut disk = Disk::new();
        let operation = disk.write();
        let mut done = disk.done(operation);
        done.completion.status = status;
        done.completion.written += more;

        let wrong = disk.report(&done);

        assert!(matches!(wrong, Err(Wrong::Status(..) | Wrong::Length(..))), "{wrong:?}");
    }
}

#[test]
fn no_request_in_flight_touches_a_block_that_another_one_writes() {
    let mut oracle = Oracle::new(BLOCKS, 3);
    let mut flights: Vec<Operation> = Vec::new();
    for slot in 0..50 {
        let Some(operation) = oracle.plan(0) else { continue };
        oracle.submitted(Tag { queue: 0, slot }, operation);
        for other in &flights {
            let (a, b) = (Disk::range(operation), Disk::range(*other));
            let both_read = !matches!(operation, Operation::Write(..)) && !matches!(other, Operation::Write(..));
            assert!(both_read || a.end <= b.start || b.end <= a.start, "{operation} and {other}");
        }
        flights.push(operation);
    }
    assert!(flights.len() > 5);
}

#[test]
fn blocks_written_last_are_frozen_until_the_requests_of_dead_servers_have_completed() {
    let mut disk = Disk::new();
    disk.good_write();
    let pending = disk.write();
    let pending = disk.done(pending);
    disk.oracle.server_died();
    let frozen = |disk: &Disk| disk.oracle.blocks.iter().filter(|block| block.frozen).count();
    let first = frozen(&disk);

    disk.oracle.server_died();
    let with_old_ones = frozen(&disk);
    disk.execute(pending.operation);
    disk.report(&pending).unwrap();
    disk.oracle.server_died();
    let recent = frozen(&disk);

    assert!(first > 0 && with_old_ones == first);
    assert_eq!(recent, Disk::range(pending.operation).len() / BLOCK);
}
