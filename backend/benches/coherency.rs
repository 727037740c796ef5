//! Cost of flushing: ranges compared with a bare loop of the instruction, and a 4 KiB request compared with one without
//! flushes. Compare figures of one run only, as ratios.
#![allow(missing_docs, reason = "a program")]
#![allow(clippy::unwrap_used, reason = "a bench may fail")]
#![allow(clippy::cast_precision_loss, reason = "figures of a measurement")]
#![expect(unsafe_code, reason = "the baseline is the bare instruction")]

mod queue;

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_device_vfio::addr::{Iova, Span};
use vhost_device_vfio::driver::{Command, Queue};
use vhost_device_vfio::hardware::CacheFlush;
use vhost_device_vfio::iommu::flush;
use vhost_device_vfio::sys::{CacheLines, Instruction, SharedMemory};
use vm_memory::MmapRegion;

use queue::shared;

/// Bytes per thread whose lines are cached when they are flushed.
const CACHED: usize = 1 << 20;
/// Bytes whose lines are in no cache; large enough for the flusher to start threads.
const LARGE: usize = 256 << 20;
const ROUNDS: usize = 15;
const REQUESTS: u32 = 20_000;

/// Shared memory and its address in this process.
struct Memory {
    shared: SharedMemory,
    at: u64,
}

fn memory(bytes: usize) -> Memory {
    let region = Arc::new(MmapRegion::new(bytes).unwrap());
    let at = region.as_ptr() as u64;
    Memory { shared: SharedMemory::of(region), at }
}

/// The baseline: only the instruction, with a fence on each side.
#[cfg(target_arch = "x86_64")]
fn bare(memory: &Memory, part: Range<usize>, lines: &CacheLines) {
    assert!(part.end <= memory.shared.len());
    let (mut at, end) = (memory.at + part.start as u64, memory.at + part.end as u64);
    // SAFETY: the assertion above keeps every line inside `memory`, which keeps its mapping. The instructions change no
    // architectural state.
    unsafe {
        std::arch::asm!("mfence", options(nostack, preserves_flags));
        if lines.instruction() == Instruction::ClflushOpt {
            while at < end {
                std::arch::asm!("clflushopt [{}]", in(reg) at, options(nostack, preserves_flags));
                at += 64;
            }
        } else {
            while at < end {
                std::arch::asm!("clflush [{}]", in(reg) at, options(nostack, preserves_flags));
                at += 64;
            }
        }
        std::arch::asm!("mfence", options(nostack, preserves_flags));
    }
}

/// As above.
#[cfg(target_arch = "aarch64")]
fn bare(memory: &Memory, part: Range<usize>, lines: &CacheLines) {
    assert!(part.end <= memory.shared.len() && lines.instruction() == Instruction::DcCivac);
    let (mut at, end) = (memory.at + part.start as u64, memory.at + part.end as u64);
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("dsb sy", options(nostack, preserves_flags));
        while at < end {
            std::arch::asm!("dc civac, {}", in(reg) at, options(nostack, preserves_flags));
            at += lines.line() as u64;
        }
        std::arch::asm!("dsb sy", options(nostack, preserves_flags));
    }
}

#[derive(Clone, Copy, Debug)]
enum Lines {
    Clean,
    Dirty,
    Uncached,
}

fn prepare(state: Lines, shared: &SharedMemory) {
    for at in (0..shared.len()).step_by(64) {
        match state {
            Lines::Clean => {
                black_box(shared.read_u64(at));
            }
            Lines::Dirty => shared.write_u64(at, at as u64),
            Lines::Uncached => {}
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

type Work<'a> = &'a (dyn Fn(&Memory) + Sync);

/// Throughput of both kinds of work in GB/s. One thread per place runs the work; a round takes as long as its slowest thread,
/// and the result is the median round.
fn measure(state: Lines, places: &[Memory], ours: Work<'_>, bare: Work<'_>) -> [f64; 2] {
    let timed = |memory: &Memory, work: Work<'_>| {
        prepare(state, &memory.shared);
        let start = Instant::now();
        work(memory);
        start.elapsed()
    };
    let timed = &timed;
    let round = |work: Work<'_>| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = places.iter().map(|memory| scope.spawn(move || timed(memory, work))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        })
    };
    let (mut times, bytes) = ([Vec::new(), Vec::new()], places.iter().map(|memory| memory.shared.len()).sum::<usize>());
    for _ in 0..ROUNDS {
        // Alternating, so that other load on the machine affects both alike.
        times[0].push(round(ours));
        times[1].push(round(bare));
    }
    times.map(|times| bytes as f64 / median(times).as_secs_f64() / 1e9)
}

fn row(state: Lines, threads: usize, [ours, bare]: [f64; 2]) {
    println!("| {state:?} | {threads} | {ours:.1} | {bare:.1} | {:.2} |", ours / bare);
}

/// Nanoseconds per 4 KiB request through a queue whose controller completes at once. A CPU writes or reads the data.
fn request(lines: Option<CacheLines>, write: bool) -> f64 {
    let data = shared(4096);
    let caches = lines.map(|lines| Arc::new(lines) as Arc<dyn CacheFlush>);
    let (mut queue, mut controller) = queue::pair(caches.clone());
    let flush = |_: ()| caches.iter().for_each(|caches| caches.flush(&data, 0, 4096));
    let buffer = [Span::new(Iova(0x1000), 4096).unwrap()];
    let mut bytes = [0; 4096];
    let mut one = |tag: u32| {
        let command = if write { Command::Write { block: 0, count: 8 } } else { Command::Read { block: 0, count: 8 } };
        if write {
            data.copy_from(0, &bytes);
        }
        queue.submit(command, &buffer, 0, 4096, tag).unwrap();
        flush(());
        queue.ring();
        controller.complete_one();
        queue.reap(&mut |completion| {
            black_box(completion);
        });
        if !write {
            flush(());
            data.copy_to(0, &mut bytes);
        }
    };
    (0..REQUESTS).for_each(&mut one);
    let times = (0..ROUNDS).map(|_| {
        let start = Instant::now();
        (0..REQUESTS / 10).for_each(&mut one);
        start.elapsed()
    });
    median(times.collect()).as_nanos() as f64 / f64::from(REQUESTS / 10)
}

fn main() {
    // Arguments are ignored: cargo passes --bench and the like.
    let Some(lines) = CacheLines::detect() else {
        return println!("this CPU has no cache-line operations in user space");
    };
    println!(
        "{:?}, lines of {} bytes; GB/s, medians of {ROUNDS} alternating rounds\n",
        lines.instruction(),
        lines.line()
    );
    println!("| lines | threads | flush | bare loop | ratio |\n|---|---|---|---|---|");
    let whole = |memory: &Memory| bare(memory, 0..memory.shared.len(), &lines);
    for threads in [1, 2] {
        let places: Vec<_> = (0..threads).map(|_| memory(CACHED)).collect();
        for state in [Lines::Clean, Lines::Dirty] {
            places.iter().for_each(|memory| prepare(Lines::Dirty, &memory.shared));
            let ours = |memory: &Memory| lines.flush(&memory.shared, 0, CACHED);
            row(state, threads, measure(state, &places, &ours, &whole));
        }
    }
    let large = [memory(LARGE)];
    prepare(Lines::Dirty, &large[0].shared);
    let alone = |memory: &Memory| lines.flush(&memory.shared, 0, LARGE);
    row(Lines::Uncached, 1, measure(Lines::Uncached, &large, &alone, &whole));
    let halves = |memory: &Memory| {
        std::thread::scope(|scope| {
            scope.spawn(|| bare(memory, LARGE / 2..LARGE, &lines));
            bare(memory, 0..LARGE / 2, &lines);
        });
    };
    let shared = |memory: &Memory| flush(&lines, &memory.shared, 0, LARGE);
    row(Lines::Uncached, 2, measure(Lines::Uncached, &large, &shared, &halves));

    println!(
        "\n| request of 4 KiB, one at a time | without flushing, ns | flushing, ns | added, ns |\n|---|---|---|---|"
    );
    for (name, write) in [("read", false), ("write", true)] {
        let (without, with) = (request(None, write), request(Some(lines), write));
        println!("| {name} | {without:.0} | {with:.0} | {:.0} |", with - without);
    }
}
