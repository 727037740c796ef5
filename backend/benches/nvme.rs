//! What a command costs this driver, beside the least that any driver would do in the same memory. Figures of one run
//! are to be read as ratios.
#![allow(missing_docs, reason = "criterion_group makes an undocumented function")]
#![allow(clippy::unwrap_used, reason = "a bench may fail")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rustix::event::{EventfdFlags, eventfd};
use vhost_device_vfio::addr::{Iova, Span};
use vhost_device_vfio::driver::nvme::prp::{self, Limits};
use vhost_device_vfio::driver::nvme::queue::{
    Doorbells, IoQueue, MAX_DEPTH, QueueSetup, Shared, completions_at, memory_needed,
};
use vhost_device_vfio::driver::{Command, Queue};
use vhost_device_vfio::hardware::Registers;
use vhost_device_vfio::sys::Window;
use vm_memory::MmapRegion;

const LIMITS: Limits = Limits { block: 512, transfer: 1 << 20 };
const BATCH: u32 = 32;

/// Doorbells that nobody hears.
struct Silent;

impl Registers for Silent {
    fn size(&self) -> usize {
        0x2000
    }
    fn read32(&self, _: usize) -> u32 {
        0
    }
    fn read64(&self, _: usize) -> u64 {
        0
    }
    fn write32(&self, offset: usize, value: u32) {
        black_box((offset, value));
    }
    fn write64(&self, offset: usize, value: u64) {
        black_box((offset, value));
    }
}

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(start), len).unwrap()
}

fn prps(c: &mut Criterion) {
    let mut group = c.benchmark_group("prp: extent and build");
    let scattered: Vec<_> = (0..32).map(|i| span(0x10_0000 + i * 0x3000, 0x1000)).collect();
    for (name, buffers) in
        [("4 KiB", vec![span(0x1000, 0x1000)]), ("128 KiB", vec![span(0x1000, 0x2_0000)]), ("32 pages", scattered)]
    {
        let list = Window::of(Arc::new(MmapRegion::new(4096).unwrap()));
        group.bench_with_input(BenchmarkId::from_parameter(name), &buffers, |b, buffers| {
            b.iter(|| {
                let extent = prp::extent(black_box(buffers), 0, LIMITS, 4096);
                prp::build(buffers, 0, extent.bytes, Iova(0x7000), |i, page| list.write_u64(i as usize * 8, page))
            });
        });
    }
    group.finish();
}

/// The controller's half: where it fetches and completes.
struct Device {
    memory: Window,
    sq_head: u16,
    cq_tail: u16,
    phase: u16,
}

impl Device {
    /// Completes the next command, knowing only its identifier.
    fn complete_one(&mut self) {
        let cid = self.memory.read_u16(usize::from(self.sq_head) * 64 + 2);
        self.sq_head = (self.sq_head + 1) % MAX_DEPTH;
        let at = completions_at(MAX_DEPTH) + usize::from(self.cq_tail) * 16;
        self.memory
            .write_u64(at + 8, u64::from(self.phase) << 48 | u64::from(cid) << 32 | 1 << 16 | u64::from(self.sq_head));
        self.cq_tail += 1;
        if self.cq_tail == MAX_DEPTH {
            (self.cq_tail, self.phase) = (0, 1 - self.phase);
        }
    }
}

fn commands(c: &mut Criterion) {
    let mut group = c.benchmark_group("queue: 32 commands of 4 KiB");
    group.throughput(Throughput::Elements(BATCH.into()));
    let memory = Window::of(Arc::new(MmapRegion::new(memory_needed(MAX_DEPTH)).unwrap()));
    let mut device = Device { memory: memory.clone(), sq_head: 0, cq_tail: 0, phase: 1 };

    group.bench_function("least: 64 bytes out, completed, 16 bytes in", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                let (entry, completion) = (device.sq_head, device.cq_tail);
                memory.write(usize::from(entry) * 64, black_box(&[0_u64; 8]));
                device.complete_one();
                black_box(memory.read::<[u64; 2]>(completions_at(MAX_DEPTH) + usize::from(completion) * 16));
            }
        });
    });

    memory.clear();
    let mut device = Device { memory: memory.clone(), sq_head: 0, cq_tail: 0, phase: 1 };
    let mut queue = IoQueue::new(QueueSetup {
        name: "bench".to_owned(),
        id: 1,
        depth: MAX_DEPTH,
        memory: Shared { window: memory, iova: Iova(0x7000_0000), caches: None },
        doorbells: Doorbells { registers: Arc::new(Silent), stride: 4 },
        namespace: 1,
        limits: LIMITS,
        sgl: None,
        event: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        awaited: None,
    });
    group.bench_function("submit, ring, completed, reap", |b| {
        let buffer = [span(0x1000, 4096)];
        b.iter(|| {
            for tag in 0..BATCH {
                let command = Command::Read { block: u64::from(tag) * 8, count: 8 };
                queue.submit(command, black_box(&buffer), 0, 4096, tag).unwrap();
            }
            queue.ring();
            (0..BATCH).for_each(|_| device.complete_one());
            queue.reap(&mut |completion| {
                black_box(completion);
            });
        });
        assert_eq!(queue.in_flight(), 0);
    });
    group.finish();
}

criterion_group!(benches, prps, commands);
criterion_main!(benches);
