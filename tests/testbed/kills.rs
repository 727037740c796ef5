//! Kills the program again and again under load, restarts it, and asks the oracle whether a request was lost, doubled or
//! reordered.
//!
//! ```text
//! exec ── connect ── session ── old requests complete ── load ── …
//!   └──────────┴─────────┴── SIGKILL at a random time ──────┘     then the disk is inspected, and the next life begins
//! ```

mod background;
mod life;
mod load;
mod report;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use vmm_sys_util::tempdir::TempDir;

use crate::client::{Error, Guest, Region, Shape};
use crate::oracle::{BLOCK, LARGEST, Oracle};
use crate::random::Random;

use life::Life;
use load::Load;

pub use background::Background;
pub use report::Report;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program to kill.
    pub program: PathBuf,
    /// How often.
    pub kills: u32,
    /// Rings and depth.
    pub shape: Shape,
    /// Whether the front-end keeps an in-flight region. Without one, requests are lost.
    pub region: Region,
    /// Seed of the load and of the times.
    pub seed: u64,
    /// Mean duration of a command of the drive, which completes them in random order.
    pub latency: Duration,
    /// Time without any completion after which a request counts as lost.
    pub patience: Duration,
    /// Further arguments of the program.
    pub arguments: Vec<String>,
}

impl Options {
    /// Two queues of depth 32, with the drive and the load that the tests use.
    #[must_use]
    pub fn new(program: PathBuf, kills: u32, packed: bool) -> Self {
        let bytes = usize::try_from(LARGEST).expect("a few blocks") * BLOCK;
        Self {
            program,
            kills,
            shape: Shape { queues: 2, depth: 32, bytes, packed, ..Shape::default() },
            region: Region::Kept,
            seed: 1,
            latency: Duration::from_micros(300),
            patience: Duration::from_secs(20),
            arguments: Vec::new(),
        }
    }
}

/// Blocks of the disk: few, so that blocks are often written again.
const BLOCKS: u64 = 1024;

/// When a life ends.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// After the start of the program.
    Exec(Duration),
    /// After the front-end has connected, while it sets up the session.
    Connected(Duration),
    /// After the rings have started, old requests in flight or not.
    Running(Duration),
    /// After all requests of the lives before have completed.
    Settled(Duration),
    /// Not by a kill.
    Never,
}

impl Moment {
    fn random(random: &mut Random) -> Self {
        let mut below = |micros| Duration::from_micros(random.below(micros));
        match below(100).as_micros() {
            0..10 => Self::Exec(below(30_000)),
            10..20 => Self::Connected(below(2_000)),
            20..35 => Self::Running(below(500)),
            35..60 => Self::Running(below(10_000)),
            _ => Self::Settled(below(20_000)),
        }
    }
}

/// Runs it, in a process without other children. An error is what went wrong, with the end of the program's log.
///
/// # Errors
/// What the oracle found, or anything that the program did not do as it must.
pub fn run(options: &Options) -> Result<Report, Error> {
    let descriptors = open_descriptors()?;
    let report = Run::new(options)?.all()?;
    if open_descriptors()? > descriptors {
        return Err(format!("{} descriptors open, {descriptors} before", open_descriptors()?).into());
    }
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    if !matches!(waitid(WaitId::All, options), Err(Errno::CHILD)) {
        return Err("a process is left".into());
    }
    Ok(report)
}

fn open_descriptors() -> Result<usize, Error> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

struct Run<'a> {
    options: &'a Options,
    directory: TempDir,
    guest: Guest,
    oracle: Oracle,
    random: Random,
    report: Report,
}

impl<'a> Run<'a> {
    fn new(options: &'a Options) -> Result<Self, Error> {
        // On a file system in memory, a flush takes the drive no time in which it would do nothing else.
        let memory = Path::new("/dev/shm");
        let directory = if memory.is_dir() { TempDir::new_in(memory)? } else { TempDir::new()? };
        File::create_new(directory.as_path().join("disk"))?.set_len(BLOCKS * BLOCK as u64)?;
        Ok(Self {
            options,
            directory,
            guest: Guest::new(options.shape, options.region)?,
            oracle: Oracle::new(BLOCKS, options.seed),
            random: Random::new(!options.seed),
            report: Report::default(),
        })
    }

    fn all(mut self) -> Result<Report, Error> {
        for _ in 0..self.options.kills {
            let moment = Moment::random(&mut self.random);
            self.life(moment).map_err(|error| self.explain(&*error))?;
        }
        self.life(Moment::Never).map_err(|error| self.explain(&*error))?;
        self.report.completions = self.oracle.completions();
        Ok(self.report)
    }

    /// The error with the circumstances.
    fn explain(&self, error: &dyn std::error::Error) -> Error {
        let log = std::fs::read_to_string(self.directory.as_path().join("log")).unwrap_or_default();
        let from = log.len().saturating_sub(4000);
        let log = log.get(from..).unwrap_or(&log);
        format!("after {} kills (seed {}): {error}\n{log}", self.report.kills, self.options.seed).into()
    }

    /// One life of the program.
    fn life(&mut self, moment: Moment) -> Result<(), Error> {
        let random = self.options.seed.wrapping_add(self.report.kills.into());
        let mut life = Life::start(self.options, self.directory.as_path(), random)?;
        if let Moment::Exec(after) = moment {
            life.kill_at(life.started + after);
        }
        self.session(&mut life, moment)?;
        self.end(life, moment)
    }

    /// From the connection to the end of the program.
    fn session(&mut self, life: &mut Life, moment: Moment) -> Result<(), Error> {
        let old = self.oracle.old_in_flight();
        let Some(socket) = life.connect(self.directory.as_path())? else { return Ok(()) };
        if let Moment::Connected(after) = moment {
            life.kill_at(Instant::now() + after);
        }
        if let Err(error) = self.guest.connect(socket) {
            let why = || format!("no session, in a life that ends at {moment:?}: {error}");
            return if life.dies() { Ok(()) } else { Err(why().into()) };
        }
        if let Moment::Running(after) = moment {
            life.kill_at(Instant::now() + after);
        }
        let mut load = Load::new(&mut self.guest, &mut self.oracle, self.options.patience);
        let settled = load.run_until_settled()?;
        self.report.resubmitted += (old - load.old_in_flight()) as u64;
        if let Some(first) = load.first_completion() {
            self.report.first.push(first - life.started);
        }
        match moment {
            Moment::Never => load.finish()?,
            Moment::Settled(after) if settled => {
                life.kill_at(Instant::now() + after);
                load.run_until_alone()?;
            }
            _ => load.run_until_alone()?,
        }
        Ok(())
    }

    /// After the end of the program.
    fn end(&mut self, life: Life, moment: Moment) -> Result<(), Error> {
        let killed = !matches!(moment, Moment::Never);
        self.guest.disconnect();
        let memory = life.end(killed)?;
        Load::new(&mut self.guest, &mut self.oracle, self.options.patience).reap()?;
        self.oracle.server_died();
        self.oracle.inspect(&File::open(self.directory.as_path().join("disk"))?)?;
        self.report.memory.extend(memory);
        self.report.kills += u32::from(killed);
        Ok(())
    }
}
