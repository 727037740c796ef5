//! A process that is killed at each of its stores while it serves a small ring, in all orders of taking, completing and
//! publishing; while the next one recovers the ring; and while that one serves it. The real rings run here, up to the store.
//!
//! After each kill, the next process must find exactly what the guest has not seen as used: what had been taken first, in its
//! order. Nothing may be lost, and nothing that has been published done again.

mod guest;

use std::sync::Arc;

use super::bare::region;
use crate::engine::guest_memory::GuestMemoryView;
use crate::engine::inflight_region::Tracking;
use crate::engine::virtqueue::Virtqueue;
use crate::engine::virtqueue::chain::{Chain, Head};
use crate::engine::{InflightRegion, Layout};
use crate::memory::MemTable;
use crate::sys::{SharedMemory, killed_after};
use guest::{Guest, number, number_at};

/// One step of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Take,
    /// Completes the n-th request in flight.
    Push(usize),
    Publish,
}

/// Memory that outlives processes.
struct Memory {
    table: Arc<MemTable>,
    guest: SharedMemory,
    record: SharedMemory,
}

impl Memory {
    fn new() -> Self {
        let (guest_region, _) = region(0x2000);
        let guest = guest_region.memory().slice(0, guest::BYTES).unwrap();
        let (record_region, _) = region(0x1000);
        let record = record_region.memory().slice(0, 0x100).unwrap();
        let table = Arc::new(MemTable::new(vec![Arc::new(guest_region)]).unwrap());
        Self { table, guest, record }
    }
}

/// A process that serves the ring.
struct Process {
    ring: Virtqueue,
    fast: bool,
    view: GuestMemoryView,
    in_flight: Vec<(Head, u64)>,
}

impl Process {
    /// Starts on the ring of `guest`, as far as the recovery.
    fn start(memory: &Memory, guest: &Guest) -> Self {
        let setup = guest.setup();
        let mut ring = Virtqueue::new(&setup, &memory.table).unwrap();
        let record = InflightRegion::new(memory.record.clone(), setup.layout, setup.size).unwrap();
        assert!(matches!(ring.track(&record), Ok(Tracking::On { .. })), "the record is not believed");
        let mut view = GuestMemoryView::default();
        view.publish(Arc::clone(&memory.table));
        Self { ring, fast: guest.fast, view, in_flight: Vec::new() }
    }

    /// Submits what was in flight again, and takes all else. Returns the numbers.
    fn take_all(&mut self) -> Vec<u64> {
        let mut chain = Chain::default();
        while self.ring.take_recovered(&mut self.view, &mut chain) {
            self.in_flight.push((chain.head(), number(&chain)));
        }
        while self.ring.available().unwrap() != 0 {
            self.take();
        }
        self.in_flight.iter().map(|(_, number)| *number).collect()
    }

    /// Takes the next request. On the fast path, each one with an odd number is left to the general path.
    fn take(&mut self) {
        if self.fast {
            let fast = self.ring.peek_fast(&mut self.view).expect("the fast shape");
            let number = number_at(fast.buffers().header);
            if number.is_multiple_of(2) {
                return self.in_flight.push((self.ring.take_fast(fast), number));
            }
            self.ring.leave_fast(fast);
        }
        let mut chain = Chain::default();
        assert!(self.ring.take(&mut self.view, &mut chain).unwrap());
        self.in_flight.push((chain.head(), number(&chain)));
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Take => self.take(),
            Step::Push(n) => {
                let (head, number) = self.in_flight.remove(n);
                self.ring.push_used(head, u32::from(number % 2 != 0));
            }
            Step::Publish => drop(self.ring.publish()),
        }
    }

    /// The steps that are possible now.
    fn steps(&self) -> Vec<Step> {
        let take = (self.ring.available().unwrap() != 0).then_some(Step::Take);
        let publish = self.ring.has_unpublished().then_some(Step::Publish);
        take.into_iter().chain((0..self.in_flight.len()).map(Step::Push)).chain(publish).collect()
    }
}

/// A ring and its guest's requests.
#[derive(Clone, Copy)]
struct World {
    layout: Layout,
    size: u16,
    /// See [`Process::take`].
    fast: bool,
    requests: u64,
}

impl World {
    /// A new guest and the process that has made `steps`.
    fn replay(self, memory: &Memory, steps: &[Step]) -> (Guest, Process) {
        memory.guest.clear();
        memory.record.clear();
        let mut guest = Guest::new((self.layout, self.size), self.fast, self.requests, &memory.guest);
        let mut process = Process::start(memory, &guest);
        for step in steps {
            process.run(*step);
            guest.reap();
        }
        (guest, process)
    }

    /// Calls `visit` for each possible sequence of steps.
    fn each_sequence(self, memory: &Memory, steps: &mut Vec<Step>, visit: &mut dyn FnMut(&[Step])) {
        let (_, process) = self.replay(memory, steps);
        for step in process.steps() {
            steps.push(step);
            visit(steps);
            self.each_sequence(memory, steps, visit);
            steps.pop();
        }
    }

    /// Kills a process at each store of the last of `steps`, and lets `check` see what it leaves. Returns the number of stores.
    fn kill_at_each_store(self, memory: &Memory, steps: &[Step], check: &mut dyn FnMut(Guest)) -> usize {
        let (last, before) = steps.split_last().unwrap();
        for stores in 0.. {
            let (guest, mut process) = self.replay(memory, before);
            let survived = killed_after(stores, || process.run(*last)).is_some();
            drop(process);
            check(guest);
            if survived {
                return stores;
            }
        }
        unreachable!()
    }
}

/// The next process finds what the guest has not seen as used, and completes it.
fn check_successor(memory: &Memory, mut guest: Guest) {
    guest.reap();
    let mut process = Process::start(memory, &guest);
    let used = guest.used.clone();
    let expected: Vec<u64> = (0..guest.offered).filter(|number| !used.contains(number)).collect();
    assert_eq!(process.take_all(), expected, "published: {used:?}");
    // The rest of the guest's requests, the last one first.
    guest.extend(2);
    loop {
        process.take_all();
        match process.in_flight.len() {
            0 => break,
            count => process.run(Step::Push(count - 1)),
        }
        if !process.in_flight.len().is_multiple_of(2) || process.in_flight.is_empty() {
            process.run(Step::Publish);
            guest.reap();
        }
    }
    let mut used = guest.used;
    used.sort_unstable();
    assert_eq!(used, (0..guest.offered).collect::<Vec<_>>());
}

/// A copy of what a killed process leaves.
struct Remains(Guest, [Vec<u8>; 2]);

impl Remains {
    fn of(memory: &Memory, guest: Guest) -> Self {
        let bytes = [&memory.guest, &memory.record].map(|shared| {
            let mut bytes = vec![0; shared.len()];
            shared.copy_to(0, &mut bytes);
            bytes
        });
        Self(guest, bytes)
    }

    /// Puts it back into `memory`. Returns the guest.
    fn restore(&self, memory: &Memory) -> Guest {
        memory.guest.copy_from(0, &self.1[0]);
        memory.record.copy_from(0, &self.1[1]);
        self.0.clone()
    }

    /// Kills the next process at each store of its recovery, and checks the one after that. Returns the number of stores.
    fn kill_the_recovery(&self, memory: &Memory) -> usize {
        for stores in 0.. {
            let guest = self.restore(memory);
            let survived = killed_after(stores, || Process::start(memory, &guest)).is_some();
            check_successor(memory, guest);
            if survived {
                return stores;
            }
        }
        unreachable!()
    }

    /// Lets the next process complete one of its requests, the `n`th, and kills it at each store of that. Returns the number of
    /// stores; `None` if there are not so many requests.
    fn kill_the_successor(&self, memory: &Memory, n: usize) -> Option<usize> {
        for stores in 0.. {
            let mut guest = self.restore(memory);
            guest.reap();
            let mut process = Process::start(memory, &guest);
            process.take_all();
            if n >= process.in_flight.len() {
                return None;
            }
            let survived = killed_after(stores, || [Step::Push(n), Step::Publish].map(|step| process.run(step)));
            check_successor(memory, guest);
            if survived.is_some() {
                return Some(stores);
            }
        }
        unreachable!()
    }
}

/// Rings that are shorter than the requests need, so that their indices wrap around, or the wrap counters change.
const SPLIT: World = World { layout: Layout::Split, size: 4, fast: false, requests: 4 };
const PACKED: [World; 3] = [
    World { layout: Layout::Packed, size: 4, fast: false, requests: 4 },
    World { layout: Layout::Packed, size: 3, fast: false, requests: 4 },
    World { layout: Layout::Packed, size: 7, fast: true, requests: 4 },
];

/// Runs `check` with each sequence of steps in `world`, and what a process leaves that is killed at each store of the last.
fn each_kill(world: World, memory: &Memory, check: &mut dyn FnMut(Guest)) -> usize {
    let mut kills = 0;
    let mut visit = |steps: &[Step]| kills += 1 + world.kill_at_each_store(memory, steps, check);
    world.each_sequence(&Memory::new(), &mut Vec::new(), &mut visit);
    kills
}

#[test]
fn killed_at_any_store_of_a_split_ring_nothing_is_lost_or_done_twice() {
    let memory = Memory::new();
    let kills = each_kill(SPLIT, &memory, &mut |guest| check_successor(&memory, guest));
    assert!(kills > 5000, "{kills}");
}

#[test]
fn killed_at_any_store_of_a_packed_ring_nothing_is_lost_or_done_twice() {
    let memory = Memory::new();
    for world in PACKED {
        let kills = each_kill(world, &memory, &mut |guest| check_successor(&memory, guest));
        assert!(kills > 2000, "{kills}");
    }
}

#[test]
fn killed_at_any_store_of_the_recovery_the_next_recovery_finds_the_same() {
    let memory = Memory::new();
    for world in [SPLIT, PACKED[0], PACKED[1], PACKED[2]] {
        let mut stores = 0;
        let mut check = |guest| stores += Remains::of(&memory, guest).kill_the_recovery(&memory);
        each_kill(World { requests: 3, ..world }, &memory, &mut check);
        assert!(stores > 500, "{stores}");
    }
}

#[test]
fn killed_at_any_store_after_a_recovery_nothing_is_lost_or_done_twice() {
    let memory = Memory::new();
    for world in [SPLIT, PACKED[0], PACKED[1], PACKED[2]] {
        let mut stores = 0;
        let mut check = |guest| {
            let remains = Remains::of(&memory, guest);
            stores += (0..).map_while(|n| remains.kill_the_successor(&memory, n)).sum::<usize>();
        };
        each_kill(World { requests: 3, ..world }, &memory, &mut check);
        assert!(stores > 500, "{stores}");
    }
}
