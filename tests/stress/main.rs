//! `stress DEVICE OPTION…`: requests of every kind and size on a block device, which know what each block must hold. Runs
//! in the guest, on the disk under test.
//!
//! Each thread has a part of the disk to itself and remembers for each block which of its writes it holds, or that it is
//! zero, or (after a discard) that nobody can know. A thread has one request at a time, so threads are the depth. Buffers
//! start anywhere in a page and are often in pieces. Sizes go from a block to a megabyte; most threads stay below 64 KiB,
//! since under nested emulation each page that a guest touches first costs it milliseconds.
//!
//! Nobody begins before all threads are there, and the time counts from then. One line a second, `ended=… gap_ms=…`: requests so far, and the longest time without one since the last line.

mod model;

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use model::{Disk, Part};

const USAGE: &str = "usage: stress DEVICE [--seconds S] [--threads N] [--block BYTES] [--seed N] [--discard] \
    [--until FILE]";

/// The largest request of one thread in eight, and of the others, bytes.
const LARGE: u64 = 1 << 20;
const SMALL: u64 = 64 << 10;

/// Why it ended early: a wrong byte, or a request that failed.
type Error = Box<dyn std::error::Error + Send + Sync>;

struct Wanted {
    device: String,
    time: Duration,
    threads: u64,
    block: u64,
    seed: u64,
    discard: bool,
    /// A file whose existence ends it, too.
    until: Option<PathBuf>,
}

/// What all threads tell the reporter.
struct Progress {
    start: Instant,
    ended: AtomicU64,
    /// When the last request ended, microseconds since the start.
    last: AtomicU64,
    /// The longest time without one since it was last asked, microseconds.
    gap: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    /// From now on.
    fn new() -> Self {
        Self {
            start: Instant::now(),
            ended: AtomicU64::new(0),
            last: AtomicU64::new(0),
            gap: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
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
    let mut wanted = Wanted {
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
            "--seconds" => wanted.time = Duration::from_secs(value()?.parse()?),
            "--threads" => wanted.threads = value()?.parse()?,
            "--block" => wanted.block = value()?.parse()?,
            "--seed" => wanted.seed = value()?.parse()?,
            "--discard" => wanted.discard = true,
            "--until" => wanted.until = Some(value()?.into()),
            _ => return Err(USAGE.into()),
        }
    }
    Ok(wanted)
}

fn run(wanted: &Wanted) -> Result<(), Error> {
    let parts = parts(wanted)?;
    let (progress, all_there) = (Progress::new(), Barrier::new(parts.len() + 1));
    let mut sum = [0; 5];
    std::thread::scope(|scope| {
        let work = |part: Part| {
            let (progress, all_there) = (&progress, &all_there);
            move || {
                all_there.wait();
                // Behind whoever reports, and whoever asks from outside.
                let done = rustix::process::nice(19).map_err(Error::from).and_then(|_| exercise(part, progress));
                if done.is_err() {
                    progress.stop.store(true, Relaxed);
                }
                done
            }
        };
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(work(part))).collect();
        all_there.wait();
        report(&progress, wanted)?;
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

/// Each thread's part of the disk. The first one's discards: each is a program's, for which others would wait.
fn parts(wanted: &Wanted) -> Result<Vec<Part>, Error> {
    let blocks = OpenOptions::new().read(true).open(&wanted.device)?.seek(SeekFrom::End(0))? / wanted.block;
    let each = blocks / wanted.threads;
    (0..wanted.threads)
        .map(|n| {
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&wanted.device)?;
            let disk = Disk {
                file,
                block: wanted.block,
                largest: if n % 8 == 0 { LARGE } else { SMALL },
                discards_as: (n == 0 && wanted.discard).then(|| wanted.device.clone()),
            };
            Ok(Part::new(disk, n * each, each, wanted.seed))
        })
        .collect()
}

/// Says once a second how far it has come, until the time is over.
fn report(progress: &Progress, wanted: &Wanted) -> Result<(), Error> {
    let start = progress.start;
    while !progress.stop.load(Relaxed) {
        std::thread::sleep(Duration::from_secs(1));
        let still = u64::try_from(start.elapsed().as_micros())?.saturating_sub(progress.last.load(Relaxed));
        let gap = progress.gap.swap(0, Relaxed).max(still);
        println!("ended={} gap_ms={}", progress.ended.load(Relaxed), gap / 1000);
        std::io::stdout().flush()?;
        if start.elapsed() >= wanted.time || wanted.until.as_ref().is_some_and(|file| file.exists()) {
            progress.stop.store(true, Relaxed);
        }
    }
    Ok(())
}

/// One thread: requests on its part, and at the end a look at all of it.
fn exercise(mut part: Part, progress: &Progress) -> Result<[u64; 5], Error> {
    let mut counts = [0; 5];
    // At least one, for the time may be over before a thread has had a processor.
    while counts == [0; 5] || !progress.stop.load(Relaxed) {
        let kind = match part.random(1000) {
            _ if part.discards() && counts == [0; 5] => part.discard().map(|()| 3),
            0..450 => part.read().map(|()| 0),
            450..900 => part.write().map(|()| 1),
            900..960 => part.zero().map(|()| 2),
            960..980 if part.discards() => part.discard().map(|()| 3),
            _ => part.flush().map(|()| 4),
        }?;
        counts[kind] += 1;
        progress.note();
    }
    part.read_all()?;
    Ok(counts)
}
