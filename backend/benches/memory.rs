//! Cost of a memory table message before anything is mapped: comparing a table of 512 regions, QEMU's maximum, with the next
//! one.
#![allow(missing_docs, reason = "criterion_group makes an undocumented function")]
#![allow(clippy::unwrap_used, reason = "a bench may fail")]

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::memory::{MemTable, Plan, Region, RegionSpec};

const REGIONS: u64 = 512;
const SIZE: u64 = 1 << 20;

/// Region `n`, followed by a gap.
fn spec(file: &Arc<File>, n: u64) -> RegionSpec {
    let start = n * 2 * SIZE;
    RegionSpec {
        gpa: Span::new(Gpa(start), SIZE).unwrap(),
        qva: Qva(1 << 46 | start),
        offset: n * SIZE,
        file: Arc::clone(file),
    }
}

fn plans(criterion: &mut Criterion) {
    let file = Arc::new(File::from(memfd_create("bench", MemfdFlags::CLOEXEC).unwrap()));
    ftruncate(&*file, (REGIONS + 1) * SIZE).unwrap();
    let region = |n| Arc::new(Region::map(spec(&file, n)).unwrap());
    let table = MemTable::new((0..REGIONS).map(region).collect()).unwrap();
    let more = region(REGIONS);
    let mut group = criterion.benchmark_group("plan: 512 regions");
    group.sample_size(20);
    group.bench_function("all announced again, one more", |bench| {
        bench.iter(|| {
            let announced = (0..=REGIONS).map(|n| spec(&file, n)).collect();
            let plan = Plan::replacing(black_box(&table), announced);
            assert_eq!((plan.keep.len(), plan.add.len(), plan.remove.len()), (512, 1, 0));
            black_box(plan.table(&[Arc::clone(&more)]).unwrap())
        });
    });
    group.bench_function("one added", |bench| {
        bench.iter(|| {
            let plan = Plan::adding(black_box(&table), spec(&file, REGIONS));
            black_box(plan.table(&[Arc::clone(&more)]).unwrap())
        });
    });
    group.bench_function("one removed", |bench| {
        let last = spec(&file, REGIONS - 1);
        bench.iter(|| {
            let plan = Plan::removing(black_box(&table), last.gpa, last.qva).unwrap();
            black_box(plan.table(&[]).unwrap())
        });
    });
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);
