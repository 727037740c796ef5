//! `stress DEVICE OPTION…`: requests of every kind and size on a block device, with verification of the data. Runs in the
//! guest, on the disk under test.
//!
//! Each thread owns a section of the disk. For each block it records which of its writes the block holds, or that it is zero,
//! or (after a discard) that its content is unknown. A thread has one request at a time, so the number of threads is the
//! queue depth. Buffers start at any offset in a page and often have two pieces. Sizes range from one block to 1 MiB; most
//! threads stay below 64 KiB, because under nested emulation the first access to a page takes the guest milliseconds.
//!
//! All threads start together, and the time counts from then. Each second it prints a line `ended=… gap_ms=…`: the number of
//! requests so far, and the longest time without a completed one since the previous line.

mod model;

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use model::{Disk, Section};

const USAGE: &str = "usage: stress DEVICE [--seconds S] [--threads N] [--block BYTES] [--seed N] [--discard] \
    [--until FILE]";

/// The largest request of one thread in eight, bytes.
const LARGE: u64 = 1 << 20;
/// The largest request of the other threads, bytes.
const SMALL: u64 = 64 << 10;

/// Wrong data, or a failed request.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// The command line.
struct Options {
    device: String,
    time: Duration,
    threads: u64,
    block: u64,
    seed: u64,
    discard: bool,
    /// The run also ends once this file exists.
    until: Option<PathBuf>,
}

/// The progress of all threads.
struct Progress {
    start: Instant,
    completed: AtomicU64,
    /// Completion of the last request, microseconds since the start.
    last: AtomicU64,
    /// The longest time between two completions since the last report, microseconds.
    gap: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            completed: AtomicU64::new(0),
            last: AtomicU64::new(0),
            gap: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    fn record_request(&self) {
        let now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.last.fetch_max(now, Relaxed);
        self.gap.fetch_max(now.saturating_sub(before), Relaxed);
        self.completed.fetch_add(1, Relaxed);
    }
}

fn main() -> ExitCode {
    match parse_options().and_then(|options| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse_options() -> Result<Options, Error> {
    let mut words = std::env::args().skip(1);
    let device = words.next().ok_or(USAGE)?;
    let mut options = Options {
        device,
        time: Duration::from_secs(10),
        threads: 128,
        block: 512,
        seed: 1,
        discard: false,
        until: None,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(USAGE);
        match word.as_str() {
            "--seconds" => options.time = Duration::from_secs(value()?.parse()?),
            "--threads" => options.threads = value()?.parse()?,
            "--block" => options.block = value()?.parse()?,
            "--seed" => options.seed = value()?.parse()?,
            "--discard" => options.discard = true,
            "--until" => options.until = Some(value()?.into()),
            _ => return Err(USAGE.into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Error> {
    let sections = sections(options)?;
    let (progress, barrier) = (Progress::new(), Barrier::new(sections.len() + 1));
    let mut sum = [0; 5];
    std::thread::scope(|scope| {
        let work = |section: Section| {
            let (progress, barrier) = (&progress, &barrier);
            move || {
                barrier.wait();
                // The reporter, and commands that inspect the guest, take precedence.
                let done = rustix::process::nice(19).map_err(Error::from).and_then(|_| exercise(section, progress));
                if done.is_err() {
                    progress.stop.store(true, Relaxed);
                }
                done
            }
        };
        let threads: Vec<_> = sections.into_iter().map(|section| scope.spawn(work(section))).collect();
        barrier.wait();
        report(&progress, options)?;
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

/// The sections of the disk, one per thread. Only the first thread discards: each discard starts a program, which delays
/// other threads.
fn sections(options: &Options) -> Result<Vec<Section>, Error> {
    let blocks = OpenOptions::new().read(true).open(&options.device)?.seek(SeekFrom::End(0))? / options.block;
    let each = blocks / options.threads;
    (0..options.threads)
        .map(|n| {
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&options.device)?;
            let disk = Disk {
                file,
                block: options.block,
                largest: if n % 8 == 0 { LARGE } else { SMALL },
                discard_device: (n == 0 && options.discard).then(|| options.device.clone()),
            };
            Ok(Section::new(disk, n * each, each, options.seed))
        })
        .collect()
}

/// Reports the progress once a second, until the time is over.
fn report(progress: &Progress, options: &Options) -> Result<(), Error> {
    let start = progress.start;
    while !progress.stop.load(Relaxed) {
        std::thread::sleep(Duration::from_secs(1));
        let still = u64::try_from(start.elapsed().as_micros())?.saturating_sub(progress.last.load(Relaxed));
        let gap = progress.gap.swap(0, Relaxed).max(still);
        println!("ended={} gap_ms={}", progress.completed.load(Relaxed), gap / 1000);
        std::io::stdout().flush()?;
        if start.elapsed() >= options.time || options.until.as_ref().is_some_and(|file| file.exists()) {
            progress.stop.store(true, Relaxed);
        }
    }
    Ok(())
}

/// Body of a thread: random requests on its section, then a check of all of it.
fn exercise(mut section: Section, progress: &Progress) -> Result<[u64; 5], Error> {
    let mut counts = [0; 5];
    // At least one request: the time may be over before a thread has run.
    while counts == [0; 5] || !progress.stop.load(Relaxed) {
        let kind = match section.random(1000) {
            _ if section.discards() && counts == [0; 5] => section.discard().map(|()| 3),
            0..450 => section.read().map(|()| 0),
            450..900 => section.write().map(|()| 1),
            900..960 => section.zero().map(|()| 2),
            960..980 if section.discards() => section.discard().map(|()| 3),
            _ => section.flush().map(|()| 4),
        }?;
        counts[kind] += 1;
        progress.record_request();
    }
    section.read_all()?;
    Ok(counts)
}
