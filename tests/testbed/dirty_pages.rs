//! The oracle of dirty pages. A guest runs a load, and its front-end keeps a copy of all memory that it brings up to date, round
//! after round, by the pages that the log names and those that the guest has written itself. When the rings have stopped, both
//! must be equal: a page that was written and not marked shows. Sometimes the log ends and starts again, or is replaced.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vmm_sys_util::tempdir::TempDir;

use crate::client::{Copy, Error, Guest, Region, Request, Shape};
use crate::random::Random;

/// Time-out of everything that the program does.
const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
/// The largest request, blocks.
const LARGEST: u64 = 4;
/// Blocks of the disk.
const DISK: u64 = 1024;
/// How often the front-end waits for completions between two rounds, on average.
const ROUND: u64 = 4;
/// Rounds between two changes of the log, on average.
const CHANGE: u64 = 10;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program to test.
    pub program: PathBuf,
    /// Number of requests.
    pub requests: u64,
    /// Rings, depth, and whether requests are bounced ([`Shape::shift`]).
    pub shape: Shape,
    /// Seed of the load.
    pub seed: u64,
    /// The program is killed half way, and the next one goes on with the same guest and the same copy.
    pub kill: bool,
    /// The front-end makes a mistake: it starts the log and never looks at it. Then the oracle must find a difference.
    pub blind: bool,
}

impl Options {
    /// Two queues of depth 16. `kind` 0 to 7: packed, linked and bounced, one bit each.
    #[must_use]
    pub fn new(program: PathBuf, requests: u64, kind: u32) -> Self {
        let bit = |n: u32| kind & 1 << n != 0;
        let bytes = (usize::try_from(LARGEST).expect("small") + 1) * BLOCK;
        let shape = Shape { queues: 2, depth: 16, bytes, packed: bit(0), indirect: !bit(1), ..Shape::default() };
        Self {
            program,
            requests,
            shape: Shape { shift: if bit(2) { 5 } else { 0 }, ..shape },
            seed: 1,
            kill: false,
            blind: false,
        }
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Requests completed.
    pub requests: u64,
    /// Rounds.
    pub rounds: u64,
    /// Pages copied in all rounds.
    pub pages: u64,
    /// Changes of the log while the rings ran.
    pub changes: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, rounds, pages, changes } = self;
        write!(f, "requests={requests} rounds={rounds} pages={pages} changes={changes}")
    }
}

/// The program under test; ends with this value.
struct Program(std::process::Child);

impl Program {
    fn start(options: &Options, directory: &TempDir) -> Result<(Self, UnixStream), Error> {
        let socket = directory.as_path().join("socket");
        let device = format!("emulated:size={},latency=20us,order=random", DISK * BLOCK as u64);
        let child = Command::new(&options.program)
            .arg("--socket-path")
            .arg(&socket)
            .args(["--device", &device, "--queues", &options.shape.queues.to_string()])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let (program, start) = (Self(child), Instant::now());
        loop {
            match UnixStream::connect(&socket) {
                Ok(connection) => return Ok((program, connection)),
                Err(error) if start.elapsed() > LIMIT => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Once it has been waited for, its PID may be another's.
        if matches!(self.0.try_wait(), Ok(None))
            && let Err(errno) = kill_process(Pid::from_child(&self.0), Signal::TERM)
        {
            eprintln!("end the program: {errno}");
        }
        drop(self.0.wait());
    }
}

/// The load and its front-end.
struct Load {
    guest: Guest,
    random: Random,
    report: Report,
    blind: bool,
}

impl Load {
    /// Fills the rings.
    fn submit(&mut self) {
        for ring in &mut self.guest.rings {
            while ring.has_room() {
                let blocks = 1 + self.random.below(LARGEST);
                let (sector, bytes) =
                    (self.random.below(DISK - LARGEST) * 8, usize::try_from(blocks).expect("small") * BLOCK);
                if self.random.once_in(2) {
                    ring.submit(Request::Read { sector, bytes });
                } else {
                    let slot = ring.submit(Request::Write { sector, bytes });
                    // Each block differs from all before, so a read changes the memory that it goes to.
                    let data: Vec<u8> =
                        (0..blocks).flat_map(|_| self.random.draw().to_le_bytes().repeat(BLOCK / 8)).collect();
                    ring.set_data(slot, &data);
                }
            }
            ring.publish();
        }
    }

    /// Takes completed requests; their number.
    fn reap(&mut self) -> Result<u64, Error> {
        let mut count = 0;
        for ring in &mut self.guest.rings {
            ring.expect_call();
            while let Some(done) = ring.reap() {
                if done.status != 0 {
                    return Err(format!("a request ended with status {}", done.status).into());
                }
                count += 1;
                ring.expect_call();
            }
        }
        self.report.requests += count;
        Ok(count)
    }

    /// Waits for completions and takes them.
    fn wait(&mut self) -> Result<(), Error> {
        if self.reap()? == 0 && !self.guest.sleep(LIMIT)? {
            return Err("no request completes".into());
        }
        Ok(())
    }

    fn round(&mut self, copy: &mut Copy) -> Result<(), Error> {
        self.report.rounds += 1;
        if self.blind {
            return Ok(());
        }
        self.guest.round(copy);
        if self.random.once_in(CHANGE) {
            self.report.changes += 1;
            self.guest.replace_log(copy)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        requests: u64,
        half_way: impl FnOnce() -> Result<Option<UnixStream>, Error>,
    ) -> Result<(), Error> {
        let mut half_way = Some(half_way);
        self.submit();
        // Requests are in flight when the log starts.
        let mut copy = self.guest.start_copy()?;
        while self.report.requests < requests {
            self.wait()?;
            self.submit();
            if self.report.requests >= requests / 2
                && let Some(act) = half_way.take()
                && let Some(socket) = act()?
            {
                self.guest.connect_logged(socket, &mut copy)?;
            }
            if self.random.once_in(ROUND) {
                self.round(&mut copy)?;
            }
            if self.random.once_in(ROUND * CHANGE) {
                self.report.changes += 1;
                self.report.pages += copy.pages;
                self.guest.end_copy()?;
                self.wait()?;
                self.submit();
                copy = self.guest.start_copy()?;
            }
        }
        // The last marks of the guest are taken while requests are in flight, so that those of the server do not hide behind them.
        self.round(&mut copy)?;
        while self.guest.rings.iter().any(|ring| !ring.is_idle()) {
            self.wait()?;
        }
        self.guest.stop()?;
        self.round(&mut copy)?;
        self.report.pages += copy.pages;
        match self.guest.first_difference(&copy) {
            None => Ok(()),
            Some(at) => Err(format!("the page at {at:#x} was written and not marked").into()),
        }
    }
}

/// Starts the program, runs the load, and compares memory and copy.
///
/// # Errors
/// A page that was not marked, a request that failed, or what the program refused.
pub fn run(options: &Options) -> Result<Report, Error> {
    let directory = TempDir::new()?;
    let (mut program, connection) = Program::start(options, &directory)?;
    run_over(connection, options, || {
        if !options.kill {
            return Ok(None);
        }
        program.0.kill()?;
        program.0.wait()?;
        let (next, connection) = Program::start(options, &directory)?;
        program = next;
        Ok(Some(connection))
    })
}

/// The same over the connection to a running program. Calls `half_way` once, with requests in flight. The program may change then,
/// and also the connection.
///
/// # Errors
/// As for [`run`].
pub fn run_over(
    connection: UnixStream,
    options: &Options,
    half_way: impl FnOnce() -> Result<Option<UnixStream>, Error>,
) -> Result<Report, Error> {
    let mut guest = Guest::new(options.shape, Region::Kept)?;
    guest.connect(connection)?;
    let (random, blind) = (Random::new(options.seed), options.blind);
    let mut load = Load { guest, random, report: Report::default(), blind };
    load.run(options.requests, half_way)?;
    Ok(load.report)
}
