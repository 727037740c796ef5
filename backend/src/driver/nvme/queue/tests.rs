//! The queue and its memory; the test acts as a controller, well-behaved or not.

mod append;
mod submission_head;

use std::sync::Arc;
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::MmapRegion;
use zerocopy::FromZeros;

use super::*;
use crate::driver::Outcome;
use crate::driver::nvme::tests::rig::Doorbell;
use crate::sys::SharedMemory;

const ID: u16 = 3;
const STRIDE: usize = 8;
const TAIL: usize = 0x1000 + 6 * STRIDE;
const HEAD: usize = TAIL + STRIDE;

/// Register writes, in order.
#[derive(Default)]
struct Written(Mutex<Vec<(usize, u32)>>);

impl Written {
    fn take(&self) -> Vec<(usize, u32)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// A queue and the controller's side of it.
struct QueueHarness {
    queue: IoQueue,
    registers: Arc<Written>,
    memory: SharedMemory,
    depth: u16,
    /// The controller's next positions in the two rings.
    sq_head: u16,
    cq_tail: u16,
    phase: u16,
}

const LISTS: Iova = Iova(0x7000_0000);

impl QueueHarness {
    fn new(depth: u16) -> Self {
        let memory = SharedMemory::of(Arc::new(MmapRegion::new(memory_needed(depth)).unwrap()));
        let registers = Arc::new(Written::default());
        let note = Arc::clone(&registers);
        let doorbell = Doorbell(move |offset, value| note.0.lock().unwrap().push((offset, value)));
        let queue = IoQueue::new(QueueSetup {
            name: "test".to_owned(),
            id: ID,
            depth,
            memory: QueueMemory { memory: memory.clone(), iova: LISTS, caches: None },
            doorbells: Doorbells { registers: Arc::new(doorbell), stride: STRIDE },
            namespace: 5,
            disk: 0,
            limits: Limits { block: 512, transfer: 1 << 20 },
            sgl: None,
            interrupt: QueueInterrupt::own(eventfd(0, EventfdFlags::CLOEXEC).unwrap(), None),
            tags: Tags::Own,
        });
        Self { queue, registers, memory, depth, sq_head: 0, cq_tail: 0, phase: 1 }
    }

    /// Fetches the next submission queue entry.
    fn fetch(&mut self) -> SubmissionEntry {
        let entry = self.memory.read(usize::from(self.sq_head) * 64);
        self.sq_head = (self.sq_head + 1) % self.depth;
        entry
    }

    fn post(&mut self, entry: CompletionEntry) {
        let at = completions_at(self.depth) + usize::from(self.cq_tail) * 16;
        self.memory.write(at, &CompletionEntry { status: entry.status << 1 | self.phase, ..entry });
        self.cq_tail += 1;
        if self.cq_tail == self.depth {
            (self.cq_tail, self.phase) = (0, 1 - self.phase);
        }
    }

    fn complete(&mut self, cid: u16, status: u16) {
        self.post(CompletionEntry { cid, status, sq_id: ID, sq_head: self.sq_head, ..CompletionEntry::new_zeroed() });
    }

    fn read(&mut self, tag: u32) -> Result<(), Full> {
        let buffer = [Span::new(Iova(0x10_0000), 512).unwrap()];
        self.queue.submit(Command::Read { block: 7, count: 1 }, &buffer, 0, 512, tag)
    }

    fn reap(&mut self) -> Vec<(u32, Outcome)> {
        let mut done = Vec::new();
        self.queue.reap(&mut |completion| done.push((completion.tag, completion.outcome)));
        done
    }
}

#[test]
fn a_write_command_is_encoded_as_specified() {
    let mut harness = QueueHarness::new(4);
    let buffers = [Span::new(Iova(0x20_0200), 0x4000).unwrap()];
    let command = Command::Write { block: 0x1_2345_6789, count: 24 };

    harness.queue.submit(command, &buffers, 0x1000, 24 * 512, 99).unwrap();

    let entry = harness.fetch();
    assert_eq!((entry.opcode, entry.flags, entry.nsid), (1, 0, 5));
    assert_eq!((entry.cdw10, entry.cdw11, entry.cdw12), (0x2345_6789, 1, 23));
    let list = memory_needed(4) - 3 * 4096;
    assert_eq!((entry.prp1, entry.prp2), (0x20_1200, LISTS.0 + list as u64));
    let pages: Vec<u64> = (0..4).map(|i| harness.memory.read_u64(list + i * 8)).collect();
    assert_eq!(pages, [0x20_2000, 0x20_3000, 0x20_4000, 0], "a list of the three pages after the first");
}

#[test]
fn a_flush_has_no_buffer() {
    let mut harness = QueueHarness::new(4);
    harness.queue.submit(Command::Flush, &[], 0, 0, 1).unwrap();
    let entry = harness.fetch();
    assert_eq!(entry, SubmissionEntry { nsid: 5, cid: entry.cid, ..SubmissionEntry::default() });
}

#[test]
fn ring_writes_the_doorbell_once_and_only_for_new_entries() {
    let mut harness = QueueHarness::new(8);
    harness.read(1).unwrap();
    harness.read(2).unwrap();
    assert_eq!(harness.registers.take(), []);

    harness.queue.ring();
    harness.queue.ring();

    assert_eq!(harness.registers.take(), [(TAIL, 2)]);
}

#[test]
fn nothing_is_reaped_while_the_phase_is_old() {
    let mut harness = QueueHarness::new(4);
    harness.read(1).unwrap();
    harness.queue.ring();
    harness.registers.take();

    assert_eq!(harness.reap(), []);

    assert_eq!(harness.registers.take(), []);
    assert_eq!(harness.queue.in_flight(), 1);
}

#[test]
fn every_depth_wraps_many_times_without_losing_a_command() {
    for depth in [2, 3, 7, 16, 255, 256] {
        let mut harness = QueueHarness::new(depth);
        let mut tag = 0;
        for round in 0..u32::from(depth) * 4 {
            let batch = round % u32::from(depth - 1) + 1;
            let first = tag;
            for _ in 0..batch {
                harness.read(tag).unwrap();
                tag += 1;
            }
            harness.queue.ring();
            let fetched: Vec<u16> = (0..batch).map(|_| harness.fetch().cid).collect();
            // Controllers complete in any order.
            for cid in fetched.into_iter().rev() {
                harness.complete(cid, 0);
            }

            let done = harness.reap();

            let expected: Vec<_> = (first..tag).rev().map(|tag| (tag, Outcome::Success)).collect();
            assert_eq!(done, expected, "depth {depth}, round {round}");
            let written = harness.registers.take();
            assert_eq!(written, [(TAIL, u32::from(harness.sq_head)), (HEAD, u32::from(harness.cq_tail))]);
            assert_eq!(harness.queue.in_flight(), 0);
        }
    }
}

#[test]
fn a_full_queue_accepts_one_more_command_after_a_completion() {
    let mut harness = QueueHarness::new(4);
    for tag in 0..3 {
        harness.read(tag).unwrap();
    }
    assert_eq!(harness.read(3), Err(Full));
    assert_eq!(harness.queue.in_flight(), 3);

    harness.queue.ring();
    let cid = harness.fetch().cid;
    harness.complete(cid, 0);

    assert_eq!(harness.reap(), [(0, Outcome::Success)]);
    assert_eq!(harness.read(3), Ok(()));
    assert_eq!(harness.read(4), Err(Full));
}

#[test]
fn a_status_becomes_an_outcome() {
    let mut harness = QueueHarness::new(8);
    for tag in 0..3 {
        harness.read(tag).unwrap();
    }
    harness.queue.ring();
    for status in [0x0281, 0x4001, 0] {
        let cid = harness.fetch().cid;
        harness.complete(cid, status);
    }
    assert_eq!(harness.reap(), [(0, Outcome::Failed), (1, Outcome::Unsupported), (2, Outcome::Success)]);
}

#[test]
fn completions_that_match_no_command_in_flight_are_dropped() {
    let mut harness = QueueHarness::new(8);
    harness.read(42).unwrap();
    harness.queue.ring();
    let cid = harness.fetch().cid;
    let free = cid ^ 1;
    for wrong in [free, 7, 0xff, 0x1ff, cid | 0x100, u16::MAX] {
        harness.complete(wrong, 0);
    }
    harness.post(CompletionEntry { cid, sq_id: ID + 1, sq_head: 1, ..CompletionEntry::new_zeroed() });

    assert_eq!(harness.reap(), []);
    assert_eq!(harness.queue.in_flight(), 1);

    harness.complete(cid, 0);
    assert_eq!(harness.reap(), [(42, Outcome::Success)]);
}

#[test]
fn a_duplicate_completion_does_not_complete_the_next_command_of_the_slot() {
    let mut harness = QueueHarness::new(8);
    harness.read(1).unwrap();
    harness.queue.ring();
    let first = harness.fetch().cid;
    harness.complete(first, 0);
    assert_eq!(harness.reap().len(), 1);
    harness.read(2).unwrap();
    harness.queue.ring();
    let second = harness.fetch().cid;
    assert_eq!(first & 0xff, second & 0xff, "the slot is used again");

    harness.complete(first, 0);

    assert_eq!(harness.reap(), []);
    harness.complete(second, 0);
    assert_eq!(harness.reap(), [(2, Outcome::Success)]);
}

#[test]
fn reap_is_bounded_even_if_the_controller_never_stops_completing() {
    let mut harness = QueueHarness::new(4);
    harness.read(1).unwrap();
    harness.queue.ring();
    let cid = harness.fetch().cid;
    harness.registers.take();
    for _ in 0..3 {
        harness.complete(u16::MAX, 0);
    }
    harness.complete(cid, 0);
    let QueueHarness { queue, memory, .. } = &mut harness;
    let mut done = 0;

    // While the last entry is handled, entries of the next phase appear. A well-behaved controller would not write them
    // before the head doorbell.
    queue.reap(&mut |_| {
        done += 1;
        for entry in 0..3 {
            memory.write_u32(completions_at(4) + entry * 16 + 12, 0x0000_ffff);
        }
    });

    assert_eq!(done, 1);
    assert_eq!(harness.registers.take(), [(HEAD, 0)], "four entries and no more");
}

#[test]
#[should_panic(expected = "a command of 2 blocks with 512 bytes of buffer")]
fn a_length_that_does_not_match_the_buffer_is_never_submitted() {
    let mut harness = QueueHarness::new(4);
    let buffer = [Span::new(Iova(0), 512).unwrap()];
    let _ = harness.queue.submit(Command::Read { block: 0, count: 2 }, &buffer, 0, 512, 0);
}

#[test]
fn a_short_transfer_is_the_command_that_submit_writes_or_nothing() {
    let mut harness = QueueHarness::new(8);
    for (start, len) in [0x10_0000, 0x10_0004, 0x10_0e00, 0x10_0002_u64]
        .into_iter()
        .flat_map(|start| [512, 4096, 4608, 8192, 8704, 100].map(|len| (start, len)))
    {
        let buffer = Span::new(Iova(start), len.into()).unwrap();
        let pages = ((start & 0xfff) + u64::from(len)).div_ceil(4096);

        let submitted = harness.queue.submit_short(Direction::Write, 7, buffer, 1);

        assert_eq!(submitted, start % 4 == 0 && len % 512 == 0 && pages <= 2, "{len} bytes at {start:#x}");
        if submitted {
            let command = Command::Write { block: 7, count: len / 512 };
            harness.queue.submit(command, &[buffer], 0, len, 1).unwrap();
            harness.queue.ring();
            let [short, other] = [(); 2].map(|()| harness.fetch());
            assert_eq!(SubmissionEntry { cid: other.cid, ..short }.words(), other.words());
            [short, other].iter().for_each(|entry| harness.complete(entry.cid, 0));
            assert_eq!(harness.reap(), [(1, Outcome::Success); 2]);
        }
    }
}

#[test]
fn a_short_transfer_keeps_to_the_limit_and_to_the_free_entries() {
    let mut harness = QueueHarness::new(2);
    harness.queue.limits.transfer = 4096;
    let buffer = |len| Span::new(Iova(0x10_0000), len).unwrap();

    assert!(!harness.queue.submit_short(Direction::Read, 7, buffer(8192), 1));
    assert!(harness.queue.submit_short(Direction::Read, 7, buffer(4096), 1));
    assert!(!harness.queue.submit_short(Direction::Read, 7, buffer(512), 2));

    harness.queue.ring();
    let entry = harness.fetch();
    assert_eq!((entry.opcode, entry.cdw12), (2, 7));
    harness.complete(entry.cid, 0);
    assert_eq!(harness.reap(), [(1, Outcome::Success)]);
}

#[test]
fn a_command_is_stalled_then_expires_once_then_is_stuck() {
    let mut harness = QueueHarness::new(4);
    harness.read(1).unwrap();
    harness.queue.ring();
    let cid = harness.fetch().cid;
    let expired = vec![CommandId { queue: ID, command: cid }];
    let stalled = |expired: &[CommandId], stuck| OverdueCommands { stalled: true, expired: expired.to_vec(), stuck };

    let found: Vec<_> = (0..8).map(|_| harness.queue.tick(4)).collect();

    let only_stalled = stalled(&[], false);
    assert_eq!(found[0], OverdueCommands::default(), "the first interval may have been short");
    assert_eq!(found[1..4], [only_stalled.clone(), only_stalled.clone(), only_stalled]);
    assert_eq!(found[4], stalled(&expired, false));
    assert_eq!(found[5], OverdueCommands::default(), "the Abort is new");
    assert_eq!(found[6..], [stalled(&[], true), stalled(&[], true)]);
}

#[test]
fn reusing_a_slot_restarts_its_clock() {
    let mut harness = QueueHarness::new(2);
    for tag in 0..10 {
        harness.read(tag).unwrap();
        harness.queue.ring();
        let cid = harness.fetch().cid;
        for _ in 0..5 {
            assert!(!harness.queue.tick(5).stuck && harness.queue.in_flight() == 1);
        }
        harness.complete(cid, 0);
        assert_eq!(harness.reap(), [(tag, Outcome::Success)]);
        assert_eq!(harness.queue.tick(5), OverdueCommands::default(), "nothing is in flight");
    }
}
