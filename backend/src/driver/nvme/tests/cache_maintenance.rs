//! Cache maintenance of queue memory, with a function whose DMA does not snoop: at each doorbell the function must see what
//! the driver wrote, and the driver must see what the function writes.

use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::rig::{Doorbell, Rig, nvme_options, small};
use crate::addr::{Iova, Span};
use crate::driver::nvme::Nvme;
use crate::driver::nvme::prp::Limits;
use crate::driver::nvme::queue::{
    Doorbells, IoQueue, QueueInterrupt, QueueMemory, QueueSetup, Tags, completions_at, memory_needed,
};
use crate::driver::nvme::sgl::Granularity;
use crate::driver::{Blocks, Command, Driver, Outcome, Queue};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function};

const DEPTH: u16 = 4;
const TAIL: usize = 0x1008;

fn no_snoop() -> Options {
    Options { no_snoop: true, snoop_enforced: false, ..small() }
}

/// An I/O queue; the test acts as the controller.
struct QueueHarness {
    machine: Machine,
    memory: DmaBuffer,
    queue: IoQueue,
    /// The queue memory as the function sees it, at each write to the submission queue's doorbell.
    found: Arc<Mutex<Vec<Vec<u8>>>>,
    completed: u16,
}

impl QueueHarness {
    fn new(sgl: Option<Granularity>) -> Self {
        let machine = Machine::new(no_snoop()).unwrap();
        let space = machine.staged_space();
        let memory = space.buffer(memory_needed(DEPTH)).unwrap();
        let found = Arc::new(Mutex::new(Vec::new()));
        let (iommu, queues, note) = (machine.iommu().clone(), memory.span(), Arc::clone(&found));
        let doorbell = Doorbell(move |offset, _| {
            if offset == TAIL {
                let mut bytes = vec![0; queues.len() as usize];
                iommu.read(queues.start(), &mut bytes).unwrap();
                note.lock().unwrap().push(bytes);
            }
        });
        let queue = IoQueue::new(QueueSetup {
            name: "test".to_owned(),
            id: 1,
            depth: DEPTH,
            memory: QueueMemory::new(&memory, space.caches()),
            doorbells: Doorbells { registers: Arc::new(doorbell), stride: 4 },
            namespace: 1,
            disk: 0,
            limits: Limits { block: 512, transfer: 1 << 20 },
            sgl,
            interrupt: QueueInterrupt::own(eventfd(0, EventfdFlags::CLOEXEC).unwrap(), None),
            tags: Tags::Own,
        });
        Self { machine, memory, queue, found, completed: 0 }
    }

    /// Rings, and returns the queue memory as the function sees it at the doorbell.
    fn ring(&mut self) -> Vec<u8> {
        self.queue.ring();
        self.found.lock().unwrap().pop().expect("a doorbell")
    }

    /// Writes the completion of command `cid`, as the controller does.
    fn complete(&mut self, cid: u16) {
        let mut entry = [0; 16];
        let phase = 1 - self.completed / DEPTH % 2;
        let sq_head = (self.completed + 1) % DEPTH;
        entry[8..10].copy_from_slice(&sq_head.to_le_bytes());
        entry[10] = 1;
        entry[12..14].copy_from_slice(&cid.to_le_bytes());
        entry[14..].copy_from_slice(&phase.to_le_bytes());
        let at = completions_at(DEPTH) as u64 + u64::from(self.completed % DEPTH) * 16;
        self.machine.iommu().write(Iova(self.memory.span().start().0 + at), &entry).unwrap();
        self.completed += 1;
    }

    fn reap(&mut self) -> Vec<u32> {
        let mut done = Vec::new();
        self.queue.reap(&mut |completion| done.push(completion.tag));
        done
    }

    /// Offset of `address` in queue memory.
    fn offset(&self, address: u64) -> usize {
        self.memory.span().offset_of(Iova(address)).expect("in queue memory") as usize
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(start), len).unwrap()
}

#[test]
fn at_each_doorbell_the_function_finds_every_new_submission_entry() {
    let mut harness = QueueHarness::new(None);
    let mut slot = 0;
    for batch in [1, 3, 2, 3, 1_u64] {
        for n in 0..batch {
            let command = Command::Read { block: 100 * batch + n, count: 1 };
            harness.queue.submit(command, &[span(0x1000, 512)], 0, 512, 0).unwrap();
        }

        let found = harness.ring();

        for n in 0..batch {
            let at = slot % usize::from(DEPTH) * 64;
            slot += 1;
            assert_eq!((found[at], word(&found, at + 40)), (2, 100 * batch + n), "entry {n} of {batch}");
            let cid = u16::from_le_bytes([found[at + 2], found[at + 3]]);
            harness.complete(cid);
        }
        assert_eq!(harness.reap().len() as u64, batch);
    }
}

#[test]
fn every_completion_the_function_writes_is_found_in_every_round() {
    let mut harness = QueueHarness::new(None);
    for tag in 0..3 * u32::from(DEPTH) {
        harness.queue.submit(Command::Flush, &[], 0, 0, tag).unwrap();
        let found = harness.ring();
        assert!(harness.reap().is_empty(), "reaping has cached the line");
        let at = usize::from(harness.completed % DEPTH) * 64;

        harness.complete(u16::from_le_bytes([found[at + 2], found[at + 3]]));

        assert_eq!(harness.reap(), [tag]);
    }
}

#[test]
fn at_the_doorbell_the_function_finds_the_prp_list() {
    let mut harness = QueueHarness::new(None);
    let command = Command::Write { block: 0, count: 640 };
    harness.queue.submit(command, &[span(0x10_0000, 640 * 512)], 0, 640 * 512, 0).unwrap();

    let found = harness.ring();

    let list = harness.offset(word(&found, 32));
    let pages: Vec<u64> = (0..79).map(|n| word(&found, list + n * 8)).collect();
    assert_eq!(pages, (1..80).map(|n| 0x10_0000 + n * 0x1000).collect::<Vec<u64>>());
}

#[test]
fn at_the_doorbell_the_function_finds_the_sgl() {
    let mut harness = QueueHarness::new(Some(Granularity::Byte));
    let buffers: Vec<_> = (0..8).map(|n| span(0x1_0001 + 0x1000 * n, 128)).collect();
    harness.queue.submit(Command::Write { block: 0, count: 2 }, &buffers, 0, 1024, 0).unwrap();

    let found = harness.ring();

    let list = harness.offset(word(&found, 24));
    let blocks: Vec<_> = (0..8).map(|n| (word(&found, list + n * 16), word(&found, list + n * 16 + 8))).collect();
    assert_eq!(blocks, (0..8).map(|n| (0x1_0001 + 0x1000 * n, 128)).collect::<Vec<_>>());
}

#[test]
fn at_the_doorbell_the_function_finds_the_ranges_of_a_discard() {
    let mut harness = QueueHarness::new(None);
    let ranges: Vec<_> = (0..9).map(|n| Blocks { first: 1000 * n, count: 8 }).collect();
    harness.queue.discard(&ranges, 0).unwrap();

    let found = harness.ring();

    let list = harness.offset(word(&found, 24));
    let firsts: Vec<u64> = (0..9).map(|n| word(&found, list + n * 16 + 8)).collect();
    assert_eq!(firsts, (0..9).map(|n| 1000 * n).collect::<Vec<u64>>());
}

/// With the emulated controller, which does all accesses itself.
#[test]
fn a_non_coherent_controller_is_brought_up_and_works() {
    let rig = Rig::new(no_snoop());
    let function = Arc::clone(&rig.function) as Arc<dyn Function>;

    let mut nvme = Nvme::bring_up(function, rig.machine.staged_space(), nvme_options(2)).unwrap();

    assert_eq!(nvme.geometry().blocks * u64::from(nvme.geometry().block_size), small().size);
    for mut queue in nvme.take_queues() {
        queue.submit(Command::Flush, &[], 0, 0, 5).unwrap();
        queue.ring();
        let mut done = Vec::new();
        queue.reap(&mut |completion| done.push((completion.tag, completion.outcome)));
        assert_eq!(done, [(5, Outcome::Success)]);
    }
    nvme.shut_down();
    assert_eq!(rig.machine.stale_lines(), crate::emulated::StaleLines::default());
    rig.assert_stopped();
}
