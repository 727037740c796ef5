//! What the driver keeps in its own memory, seen by a function that goes behind the CPU caches: at the moment of a doorbell
//! it must find there what was written, and the driver must find what the function writes.

use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::rig::{Doorbell, Rig, small, wanted};
use crate::addr::{Iova, Span};
use crate::driver::nvme::Nvme;
use crate::driver::nvme::prp::Limits;
use crate::driver::nvme::queue::{Doorbells, IoQueue, QueueSetup, Shared, completions_at, memory_needed};
use crate::driver::nvme::sgl::Granularity;
use crate::driver::{Blocks, Command, Driver, Outcome, Queue};
use crate::emulated::{Machine, Options};
use crate::hardware::{DmaBuffer, Function};

const DEPTH: u16 = 4;
const TAIL: usize = 0x1008;

fn behind() -> Options {
    Options { no_snoop: true, snoop_enforced: false, ..small() }
}

/// An I/O queue whose controller is the test.
struct Bench {
    machine: Machine,
    memory: DmaBuffer,
    queue: IoQueue,
    /// At each ring of the submission queue's doorbell, all queue memory as the function finds it.
    found: Arc<Mutex<Vec<Vec<u8>>>>,
    completed: u16,
}

impl Bench {
    fn new(sgl: Option<Granularity>) -> Self {
        let machine = Machine::new(behind()).unwrap();
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
            memory: Shared::of(&memory, space.caches()),
            doorbells: Doorbells { registers: Arc::new(doorbell), stride: 4 },
            namespace: 1,
            limits: Limits { block: 512, transfer: 1 << 20 },
            sgl,
            event: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            interrupt_wanted: None,
        });
        Self { machine, memory, queue, found, completed: 0 }
    }

    /// Rings, and gives what the function finds in queue memory at that moment.
    fn ring(&mut self) -> Vec<u8> {
        self.queue.ring();
        self.found.lock().unwrap().pop().expect("a doorbell")
    }

    /// What the controller would write for the command with this identifier.
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

    /// Where in queue memory the function would look for `address`.
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
    let mut bench = Bench::new(None);
    let mut slot = 0;
    for batch in [1, 3, 2, 3, 1_u64] {
        for n in 0..batch {
            let command = Command::Read { block: 100 * batch + n, count: 1 };
            bench.queue.submit(command, &[span(0x1000, 512)], 0, 512, 0).unwrap();
        }

        let found = bench.ring();

        for n in 0..batch {
            let at = slot % usize::from(DEPTH) * 64;
            slot += 1;
            assert_eq!((found[at], word(&found, at + 40)), (2, 100 * batch + n), "entry {n} of {batch}");
            let cid = u16::from_le_bytes([found[at + 2], found[at + 3]]);
            bench.complete(cid);
        }
        assert_eq!(bench.reap().len() as u64, batch);
    }
}

#[test]
fn every_completion_the_function_writes_is_found_lap_after_lap() {
    let mut bench = Bench::new(None);
    for tag in 0..3 * u32::from(DEPTH) {
        bench.queue.submit(Command::Flush, &[], 0, 0, tag).unwrap();
        let found = bench.ring();
        assert!(bench.reap().is_empty(), "the lines have been looked at, and are cached");
        let at = usize::from(bench.completed % DEPTH) * 64;

        bench.complete(u16::from_le_bytes([found[at + 2], found[at + 3]]));

        assert_eq!(bench.reap(), [tag]);
    }
}

#[test]
fn at_the_doorbell_the_function_finds_the_prp_list() {
    let mut bench = Bench::new(None);
    let command = Command::Write { block: 0, count: 640 };
    bench.queue.submit(command, &[span(0x10_0000, 640 * 512)], 0, 640 * 512, 0).unwrap();

    let found = bench.ring();

    let list = bench.offset(word(&found, 32));
    let pages: Vec<u64> = (0..79).map(|n| word(&found, list + n * 8)).collect();
    assert_eq!(pages, (1..80).map(|n| 0x10_0000 + n * 0x1000).collect::<Vec<u64>>());
}

#[test]
fn at_the_doorbell_the_function_finds_the_sgl() {
    let mut bench = Bench::new(Some(Granularity::Byte));
    let buffers: Vec<_> = (0..8).map(|n| span(0x1_0001 + 0x1000 * n, 128)).collect();
    bench.queue.submit(Command::Write { block: 0, count: 2 }, &buffers, 0, 1024, 0).unwrap();

    let found = bench.ring();

    let list = bench.offset(word(&found, 24));
    let blocks: Vec<_> = (0..8).map(|n| (word(&found, list + n * 16), word(&found, list + n * 16 + 8))).collect();
    assert_eq!(blocks, (0..8).map(|n| (0x1_0001 + 0x1000 * n, 128)).collect::<Vec<_>>());
}

#[test]
fn at_the_doorbell_the_function_finds_the_ranges_of_a_discard() {
    let mut bench = Bench::new(None);
    let ranges: Vec<_> = (0..9).map(|n| Blocks { first: 1000 * n, count: 8 }).collect();
    bench.queue.discard(&ranges, 0).unwrap();

    let found = bench.ring();

    let list = bench.offset(word(&found, 24));
    let firsts: Vec<u64> = (0..9).map(|n| word(&found, list + n * 16 + 8)).collect();
    assert_eq!(firsts, (0..9).map(|n| 1000 * n).collect::<Vec<u64>>());
}

/// The controller is the emulated one, which fetches and writes all that by itself.
#[test]
fn a_controller_behind_the_caches_is_brought_up_and_works() {
    let rig = Rig::new(behind());
    let function = Arc::clone(&rig.function) as Arc<dyn Function>;

    let mut nvme = Nvme::bring_up(function, rig.machine.staged_space(), wanted(2)).unwrap();

    assert_eq!(nvme.geometry().blocks * u64::from(nvme.geometry().block_size), small().size);
    for mut queue in nvme.take_queues() {
        queue.submit(Command::Flush, &[], 0, 0, 5).unwrap();
        queue.ring();
        let mut done = Vec::new();
        queue.reap(&mut |completion| done.push((completion.tag, completion.outcome)));
        assert_eq!(done, [(5, Outcome::Success)]);
    }
    nvme.shut_down();
    assert_eq!(rig.machine.disagreements(), crate::emulated::Disagreements::default());
    rig.assert_stopped();
}
