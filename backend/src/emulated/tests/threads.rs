//! Concurrent threads: workers on their queues, mapping, and reset.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use super::host::{Host, Sqe, small, threaded};
use crate::addr::{Address, Iova, Span};
use crate::emulated::{Options, SoftIommu};
use crate::hardware::AddressSpace;

/// Maps and unmaps until told to stop.
fn map_and_unmap(iommu: &SoftIommu, stop: &AtomicBool) {
    while !stop.load(SeqCst) {
        let buffers: Vec<_> = (1..4).map(|pages| iommu.buffer(pages * 4096).unwrap()).collect();
        drop(buffers);
    }
}

#[test]
fn workers_on_separate_queues_are_independent_of_each_other_and_of_mapping() {
    for options in [small(), threaded(), Options { latency: Duration::from_micros(20), ..threaded() }] {
        let mut host = Host::enabled(options);
        let pairs = [host.pair(1, [8; 2]), host.pair(2, [8; 2]), host.pair(3, [8; 2])];
        let (host, stop) = (&host, &AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| map_and_unmap(host.machine.iommu(), stop));
            let workers = pairs.map(|mut pair| {
                scope.spawn(move || {
                    let data = host.buffer(4096);
                    let lba = u64::from(pair.id) * 8;
                    for round in 0..200_u64 {
                        data.memory().write_u64(8, round << 8 | lba);
                        let command = |opcode| Sqe::rw(opcode, lba, 8).prps(data.span().start(), Iova(0));
                        assert_eq!(host.run(&mut pair, command(1)).status, 0);
                        data.memory().write_u64(8, u64::MAX);
                        assert_eq!(host.run(&mut pair, command(2)).status, 0);
                        assert_eq!(data.memory().read_u64(8), round << 8 | lba);
                    }
                })
            });
            for worker in workers {
                worker.join().unwrap();
            }
            stop.store(true, SeqCst);
        });
        assert_eq!(host.machine.iommu().faults(), []);
        assert_eq!(host.machine.traffic().reads, 600);
    }
}

#[test]
fn no_dma_runs_after_a_reset_even_while_doorbells_are_written() {
    for options in [small(), threaded()] {
        let mut host = Host::enabled(options);
        for _ in 0..10 {
            let mut pair = host.pair(1, [64; 2]);
            let data = host.buffer(4096);
            let at = data.span().start();
            for _ in 0..63 {
                host.push(&mut pair, Sqe::rw(2, 0, 8).prps(at, Iova(0)));
            }
            let (shared, stop) = (&host, &AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut tail = 1;
                    while !stop.load(SeqCst) {
                        shared.bar.write32(shared.doorbell(2), tail % 64);
                        tail += 1;
                    }
                });
                while pair.peek().is_none() {
                    std::thread::yield_now();
                }
                shared.function.reset().unwrap();
                data.memory().copy_from(0, &[0xaa; 4096]);
                for _ in 0..4 {
                    std::thread::yield_now();
                }
                stop.store(true, SeqCst);
            });
            let mut found = [0; 4096];
            data.memory().copy_to(0, &mut found);
            assert_eq!(found, [0xaa; 4096]);
            host.function.set_bus_master(true).unwrap();
            host.enable();
        }
    }
}

#[test]
fn unmapping_while_commands_run_causes_faults_and_no_late_write() {
    let mut host = Host::enabled(threaded());
    let mut pair = host.pair(1, [64; 2]);
    let shared = crate::sys::SharedMemory::of(std::sync::Arc::new(vm_memory::MmapRegion::new(4096).unwrap()));
    let span = Span::new(Iova(0x10_0000), 4096).unwrap();
    for _ in 0..50 {
        host.machine.iommu().map(span, shared.clone()).unwrap();
        for _ in 0..8 {
            host.push(&mut pair, Sqe::rw(2, 0, 8).prps(span.start(), Iova(0)));
        }
        host.ring(&pair);

        host.machine.iommu().unmap(span).unwrap();
        shared.copy_from(0, &[0xaa; 4096]);

        for _ in 0..8 {
            let done = loop {
                if let Some(done) = host.take(&mut pair) {
                    break done;
                }
                std::thread::yield_now();
            };
            assert!(matches!(done.status, 0 | 0x004), "{done:?}");
        }
        let mut found = [0; 4096];
        shared.copy_to(0, &mut found);
        assert_eq!(found, [0xaa; 4096]);
    }
    assert!(host.machine.iommu().faults().iter().all(|fault| fault.iova.raw() == 0x10_0000));
}
