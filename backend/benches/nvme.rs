//! Cost of a command in this driver, compared with a lower bound: the memory accesses that every driver needs. Compare figures
//! of one run only, as ratios.
#![allow(missing_docs, reason = "criterion_group makes an undocumented function")]
#![allow(clippy::unwrap_used, reason = "a bench may fail")]

mod queue;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vhost_device_vfio::addr::{Iova, Span};
use vhost_device_vfio::driver::nvme::prp;
use vhost_device_vfio::driver::nvme::queue::{MAX_DEPTH, completions_at, memory_needed};
use vhost_device_vfio::driver::{Command, Queue};

use queue::{Controller, LIMITS};

const BATCH: u32 = 32;

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(start), len).unwrap()
}

fn prps(c: &mut Criterion) {
    let mut group = c.benchmark_group("prp: extent and build");
    let scattered: Vec<_> = (0..32).map(|i| span(0x10_0000 + i * 0x3000, 0x1000)).collect();
    for (name, buffers) in
        [("4 KiB", vec![span(0x1000, 0x1000)]), ("128 KiB", vec![span(0x1000, 0x2_0000)]), ("32 pages", scattered)]
    {
        let list = queue::shared(4096);
        group.bench_with_input(BenchmarkId::from_parameter(name), &buffers, |b, buffers| {
            b.iter(|| {
                let extent = prp::extent(black_box(buffers), 0, LIMITS, 4096);
                prp::build(buffers, 0, extent.bytes, Iova(0x7000), |i, page| list.write_u64(i as usize * 8, page))
            });
        });
    }
    group.finish();
}

fn commands(c: &mut Criterion) {
    let mut group = c.benchmark_group("queue: 32 commands of 4 KiB");
    group.throughput(Throughput::Elements(BATCH.into()));
    let mut device = Controller::new(queue::shared(memory_needed(MAX_DEPTH)));

    group.bench_function("least: 64 bytes out, completed, 16 bytes in", |b| {
        b.iter(|| {
            for _ in 0..BATCH {
                let (entry, completion) = (device.sq_head, device.cq_tail);
                device.memory.write(usize::from(entry) * 64, black_box(&[0_u64; 8]));
                device.complete_one();
                black_box(device.memory.read::<[u64; 2]>(completions_at(MAX_DEPTH) + usize::from(completion) * 16));
            }
        });
    });

    let (mut queue, mut device) = queue::pair(None);
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
