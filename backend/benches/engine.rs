//! Cost of a 4 KiB read in one worker, with 1 or 32 requests in flight: from the ring to the device queue and back. The
//! controller, and the driver that makes the next requests available, are a few lines in the doorbell write. So no pass of the
//! worker is empty, and the instructions repeat; `scripts/bench instructions` counts them and leaves the doorbell write out.
//!
//! `engine --count READS CHAINS DEPTH WORKERS` has each worker serve so many reads and ends; else this is a bench of criterion.
#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::unwrap_used, reason = "a bench may fail")]

mod queue;
mod requests;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use rustix::event::{EventfdFlags, eventfd};
use vhost_device_vfio::addr::{Iova, Span};
use vhost_device_vfio::driver::nvme::queue::{MAX_DEPTH, memory_needed};
use vhost_device_vfio::driver::{CommandId, Driver, Geometry, Queue};
use vhost_device_vfio::engine::{Engine, Options, VringSetup, WatchdogOptions};
use vhost_device_vfio::hardware::{AddressSpace, DmaBuffer, MapError, Registers};
use vhost_device_vfio::memory::Region;
use vhost_device_vfio::sys::SharedMemory;

use queue::{Controller, shared};
use requests::{AVAIL, STRIDE, USED, fill, memory, setup};

/// Reads of one iteration.
const READS: u32 = 32_000;
/// Doorbell of the submission queue of queue pair 1 (NVMe over PCIe Transport 1.0 §3.1.2.1).
const SUBMISSION_DOORBELL: usize = 0x1008;

/// What the doorbell write does: it completes the commands, and makes as many requests available.
struct Other {
    controller: Controller,
    guest: SharedMemory,
    depth: u16,
    avail: u16,
    /// Reads that are not available yet.
    rest: u32,
    waiting: Option<Thread>,
}

impl Other {
    /// Makes `count` more requests available.
    fn offer(&mut self, count: u16) {
        self.rest = self.rest.saturating_sub(count.into());
        self.avail = self.avail.wrapping_add(count);
        self.guest.store_release_u16(index(AVAIL), self.avail);
    }
}

/// Offset of a ring's index.
fn index(ring: u64) -> usize {
    usize::try_from(ring).unwrap() + 2
}

#[derive(Clone)]
struct Doorbells(Arc<Mutex<Other>>);

impl Registers for Doorbells {
    fn size(&self) -> usize {
        0x2000
    }
    fn read32(&self, _: usize) -> u32 {
        0
    }
    fn read64(&self, _: usize) -> u64 {
        0
    }
    #[inline(never)]
    fn write32(&self, offset: usize, tail: u32) {
        if offset != SUBMISSION_DOORBELL {
            return;
        }
        let mut other = self.0.lock().unwrap();
        let mut completed = 0;
        while u32::from(other.controller.sq_head) != tail {
            other.controller.complete_one();
            completed += 1;
        }
        if other.rest != 0 {
            other.offer(completed);
        } else if let Some(thread) = other.waiting.take() {
            thread.unpark();
        }
    }
    fn write64(&self, _: usize, _: u64) {}
}

struct Drive {
    geometry: Geometry,
    queues: Vec<Box<dyn Queue>>,
}

impl Driver for Drive {
    fn geometries(&self) -> &[Geometry] {
        std::slice::from_ref(&self.geometry)
    }
    fn take_queues(&mut self) -> Vec<Box<dyn Queue>> {
        std::mem::take(&mut self.queues)
    }
    fn recover(&mut self) -> anyhow::Result<Vec<Box<dyn Queue>>> {
        anyhow::bail!("this controller cannot be reset")
    }
    fn check(&self) -> anyhow::Result<()> {
        Ok(())
    }
    fn abort(&mut self, _: &[CommandId]) -> anyhow::Result<()> {
        Ok(())
    }
    fn removal_request(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn release(&mut self) {}
    fn set_write_cache(&mut self, _: bool) -> anyhow::Result<()> {
        Ok(())
    }
    fn shut_down(&mut self) {}
}

/// Nothing is mapped, because the controller moves no data.
struct NoSpace;

impl AddressSpace for NoSpace {
    fn add(&self, _: &Arc<Region>) -> Result<(), MapError> {
        Ok(())
    }
    fn remove(&self, _: &Region) -> Result<(), MapError> {
        Ok(())
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        let span = Span::new(Iova(1 << 44), bytes as u64).unwrap();
        Ok(DmaBuffer::new(shared(bytes), span, Box::new(())))
    }
}

/// A split ring of a worker of its own, and what is on its other side.
struct Side {
    other: Arc<Mutex<Other>>,
    guest: SharedMemory,
    kick: OwnedFd,
}

/// An engine, and one side for each worker.
struct Rig {
    _engine: Engine,
    sides: Vec<Side>,
}

impl Rig {
    fn new(indirect: bool, depth: u16, workers: usize) -> Self {
        let memory = memory(workers as u64);
        let regions: Vec<_> = memory.ours.regions().iter().map(|region| region.memory().clone()).collect();
        let mut drive = Drive { geometry: geometry(), queues: Vec::new() };
        let mut sides = Vec::new();
        for (guest, base) in regions.into_iter().zip((0..).step_by(usize::try_from(STRIDE).unwrap())) {
            fill(&memory.theirs, base, 1, indirect);
            let pages = shared(memory_needed(MAX_DEPTH));
            let controller = Controller::new(pages.clone());
            let other = Other { controller, guest: guest.clone(), depth, avail: 0, rest: 0, waiting: None };
            let other = Arc::new(Mutex::new(other));
            drive.queues.push(Box::new(queue::queue(&pages, Arc::new(Doorbells(Arc::clone(&other))), None)));
            sides.push(Side { other, guest, kick: eventfd(0, EventfdFlags::CLOEXEC).unwrap() });
        }
        let space: Arc<dyn AddressSpace> = Arc::new(NoSpace);
        let watch = WatchdogOptions::default();
        let options = Options {
            rings: workers,
            spin: Duration::ZERO,
            drain_timeout: Duration::from_secs(10),
            watch,
            placement: Default::default(),
        };
        let engine = Engine::start(Box::new(drive), &space, options).unwrap();
        engine.publish(Arc::clone(&memory.ours));
        for (index, side) in sides.iter().enumerate() {
            let kick = Some(side.kick.try_clone().unwrap());
            engine.start_ring(VringSetup { index, kick, ..setup(index as u64 * STRIDE) }).unwrap();
            engine.set_enabled(index, true);
        }
        Self { _engine: engine, sides }
    }

    /// Each worker serves this many reads, or a few more: as many as are in flight at a time.
    fn serve(&self, reads: u32) {
        self.sides.iter().for_each(|side| side.start(reads));
        while !self.sides.iter().all(Side::is_done) {
            thread::park_timeout(Duration::from_millis(1));
        }
    }
}

impl Side {
    fn start(&self, reads: u32) {
        {
            let mut other = self.other.lock().unwrap();
            (other.rest, other.waiting) = (reads, Some(thread::current()));
            let depth = other.depth;
            other.offer(depth);
        }
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    fn is_done(&self) -> bool {
        let other = self.other.lock().unwrap();
        other.waiting.is_none() && self.guest.load_acquire_u16(index(USED)) == other.avail
    }
}

fn geometry() -> Geometry {
    Geometry { blocks: 1 << 20, block_size: 512, physical_block_size: 512, ..Geometry::default() }
}

fn reads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read");
    group.throughput(Throughput::Elements(READS.into()));
    for (chains, indirect) in [("linked", false), ("indirect", true)] {
        for depth in [1, 32] {
            let rig = Rig::new(indirect, depth, 1);
            group.bench_function(BenchmarkId::new(chains, depth), |bench| {
                bench.iter_custom(|rounds| {
                    let start = Instant::now();
                    (0..rounds).for_each(|_| rig.serve(READS));
                    start.elapsed()
                });
            });
        }
    }
    group.finish();
}

fn main() {
    let words: Vec<_> = std::env::args().skip(1).collect();
    if let [flag, count, chains, depth, workers, ..] = words.as_slice()
        && flag == "--count"
    {
        let rig = Rig::new(chains == "indirect", depth.parse().unwrap(), workers.parse().unwrap());
        return rig.serve(count.parse().unwrap());
    }
    let mut criterion = Criterion::default().configure_from_args();
    reads(&mut criterion);
    criterion.final_summary();
}
