//! `stress DEVICE OPTION…`: requests of every kind and size on a block device, which know what each block must hold. Runs
//! in the guest, on the disk under test.
//!
//! Each thread has a part of the disk to itself and remembers for each block which of its writes it holds, or that it is
//! zero, or (after a discard) that nobody can know. A thread has one request at a time, so threads are the depth. Buffers
//! start anywhere in a page and are often in pieces, sizes go from a block to a megabyte.
//!
//! One line a second, `ended=… gap_ms=…`: requests so far, and the longest time without one since the last line.

mod model;

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use model::Part;

const USAGE: &str = "usage: stress DEVICE [--seconds S] [--threads N] [--block BYTES] [--seed N] [--discard]";

/// Why it ended early: a wrong byte, or a request that failed.
type Error = Box<dyn std::error::Error + Send + Sync>;

struct Wanted {
    device: String,
    time: Duration,
    threads: u64,
    block: u64,
    seed: u64,
    discard: bool,
}

/// What all threads tell the reporter.
#[derive(Default)]
struct Progress {
    ended: AtomicU64,
    /// When the last request ended, microseconds since the start.
    last: AtomicU64,
    /// The longest time without one since it was last asked, microseconds.
    gap: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    fn note(&self, start: Instant) {
        let now = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.last.fetch_max(now, Relaxed);
        self.gap.fetch_max(now.saturating_sub(before), Relaxed);
        self.ended.fetch_add(1, Relaxed);
    }
}

fn main() -> ExitCode {
    match wanted().and_then(|wanted| run(&wanted)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wanted() -> Result<Wanted, Error> {
    let mut words = std::env::args().skip(1);
    let device = words.next().ok_or(USAGE)?;
    let mut wanted =
        Wanted { device, time: Duration::from_secs(10), threads: 128, block: 512, seed: 1, discard: false };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(USAGE);
        match word.as_str() {
            "--seconds" => wanted.time = Duration::from_secs(value()?.parse()?),
            "--threads" => wanted.threads = value()?.parse()?,
            "--block" => wanted.block = value()?.parse()?,
            "--seed" => wanted.seed = value()?.parse()?,
            "--discard" => wanted.discard = true,
            _ => return Err(USAGE.into()),
        }
    }
    Ok(wanted)
}

fn run(wanted: &Wanted) -> Result<(), Error> {
    let blocks = OpenOptions::new().read(true).open(&wanted.device)?.seek(SeekFrom::End(0))? / wanted.block;
    let each = blocks / wanted.threads;
    let (progress, start) = (Progress::default(), Instant::now());
    let mut sum = [0; 5];
    std::thread::scope(|scope| {
        let work = |n: u64| {
            let progress = &progress;
            move || {
                let done = exercise(wanted, n * each, each, progress, start);
                if done.is_err() {
                    progress.stop.store(true, Relaxed);
                }
                done
            }
        };
        let threads: Vec<_> = (0..wanted.threads).map(|n| scope.spawn(work(n))).collect();
        report(&progress, start, wanted.time)?;
        for thread in threads {
            let counts = thread.join().map_err(|_| "a thread panicked")??;
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        Ok::<_, Error>(())
    })?;
    let [reads, writes, zeroes, discards, flushes] = sum;
    println!("reads={reads} writes={writes} zeroes={zeroes} discards={discards} flushes={flushes} wrong=0");
    Ok(())
}

/// Says once a second how far it has come, until the time is over.
fn report(progress: &Progress, start: Instant, time: Duration) -> Result<(), Error> {
    while !progress.stop.load(Relaxed) {
        std::thread::sleep(Duration::from_secs(1));
        let still = u64::try_from(start.elapsed().as_micros())?.saturating_sub(progress.last.load(Relaxed));
        let gap = progress.gap.swap(0, Relaxed).max(still);
        println!("ended={} gap_ms={}", progress.ended.load(Relaxed), gap / 1000);
        std::io::stdout().flush()?;
        if start.elapsed() >= time {
            progress.stop.store(true, Relaxed);
        }
    }
    Ok(())
}

/// One thread: requests on `count` blocks from `first` on, and at the end a look at all of them.
fn exercise(wanted: &Wanted, first: u64, count: u64, progress: &Progress, start: Instant) -> Result<[u64; 5], Error> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&wanted.device)?;
    let mut part = Part::new(file, &wanted.device, wanted.block, first, count, wanted.seed ^ first);
    let mut counts = [0; 5];
    while !progress.stop.load(Relaxed) {
        let kind = match part.random(1000) {
            0..450 => part.read().map(|()| 0),
            450..900 => part.write().map(|()| 1),
            900..960 => part.zero().map(|()| 2),
            // By a program, which is slow to start; others would wait for it.
            960..980 if wanted.discard && first == 0 => part.discard().map(|()| 3),
            _ => part.flush().map(|()| 4),
        }?;
        counts[kind] += 1;
        progress.note(start);
    }
    part.read_all()?;
    Ok(counts)
}
