//! `load SOCKET OPTION…`: reads from a vhost-user-blk disk at a given queue depth, and measures throughput and the server's
//! CPU time. Prints one line of `name=value` pairs; `scripts/bench` makes tables of them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use testbed::client::{Client, Error, Request, Ring, Shape};

const USAGE: &str = "usage: load SOCKET [--depth N] [--queues N] [--bytes N] [--seconds S] [--requests N] \
    [--pid SERVER] [--packed] [--no-indirect] [--no-event-idx] [--sleep] [--idle]";

/// The command line.
struct Options {
    socket: PathBuf,
    shape: Shape,
    /// Duration of the measurement.
    time: Duration,
    /// The measurement also ends after this many requests.
    requests: u64,
    /// PID of the server.
    server: Option<u32>,
    /// Wait for calls instead of polling.
    sleep: bool,
    /// Connect, but submit no requests.
    idle: bool,
}

fn main() -> ExitCode {
    match parse_options().and_then(|options| run(&options)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse_options() -> Result<Options, Error> {
    let mut words = std::env::args().skip(1);
    let socket = words.next().ok_or(USAGE)?.into();
    let shape = Shape { depth: 1, bytes: 4096, ..Shape::default() };
    let mut options = Options {
        socket,
        shape,
        time: Duration::from_secs(2),
        requests: u64::MAX,
        server: None,
        sleep: false,
        idle: false,
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(USAGE);
        match word.as_str() {
            "--depth" => options.shape.depth = value()?.parse()?,
            "--queues" => options.shape.queues = value()?.parse()?,
            "--bytes" => options.shape.bytes = value()?.parse()?,
            "--seconds" => options.time = Duration::from_secs_f64(value()?.parse()?),
            "--requests" => (options.requests, options.time) = (value()?.parse()?, Duration::MAX),
            "--pid" => options.server = Some(value()?.parse()?),
            "--packed" => options.shape.packed = true,
            "--no-indirect" => options.shape.indirect = false,
            "--no-event-idx" => options.shape.event_idx = false,
            "--idle" => options.idle = true,
            "--sleep" => options.sleep = true,
            _ => return Err(USAGE.into()),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<String, Error> {
    let mut client = Client::connect(&options.socket, options.shape)?;
    let sectors = client.capacity() - options.shape.bytes as u64 / 512;
    if options.requests == u64::MAX {
        // Warm up: afterwards the server has touched all its memory.
        drive(&mut client, options, sectors, Duration::from_millis(200))?;
    }
    if options.idle {
        return idle(options);
    }
    let kicks: u64 = client.rings.iter().map(|ring| ring.kicks).sum();
    let (before, start) = (ServerUsage::now(options.server)?, Instant::now());
    let done = drive(&mut client, options, sectors, options.time)?;
    let (elapsed, after) = (start.elapsed().as_secs_f64(), ServerUsage::now(options.server)?);
    let kicks = client.rings.iter().map(|ring| ring.kicks).sum::<u64>() - kicks;
    #[expect(clippy::cast_precision_loss, reason = "figures of a measurement")]
    let per = |count: u64| count as f64 / done as f64;
    let cpu = (after.cpu - before.cpu) * 1e9 * per(1);
    let switches = per(after.switches.saturating_sub(before.switches));
    Ok(format!(
        "iops={:.0} cpu_ns={cpu:.0} switches={switches:.4} kicks={:.4} rss_kib={}",
        1.0 / (elapsed * per(1)),
        per(kicks),
        after.rss_kib
    ))
}

/// Measures the CPU time of a server with an idle client.
fn idle(options: &Options) -> Result<String, Error> {
    let (before, start) = (ServerUsage::now(options.server)?, Instant::now());
    std::thread::sleep(options.time);
    let after = ServerUsage::now(options.server)?;
    let percent = 100.0 * (after.cpu - before.cpu) / start.elapsed().as_secs_f64();
    Ok(format!("idle_percent={percent:.2} rss_kib={}", after.rss_kib))
}

/// Keeps every ring full for `time`. Returns the number of completed requests.
fn drive(client: &mut Client, options: &Options, sectors: u64, time: Duration) -> Result<u64, Error> {
    let (mut random, mut done, start) = (0x9e37_79b9_7f4a_7c15_u64, 0, Instant::now());
    let mut passes = 0_u32;
    loop {
        for ring in &mut client.rings {
            done += reap(ring)?;
            if fill(ring, options, sectors, &mut random) {
                ring.publish();
                if !options.sleep {
                    ring.suppress_calls();
                }
            }
        }
        if options.sleep
            && let Some(request) = client.rings[0].wait(Duration::from_secs(20))?
        {
            check(request.status)?;
            done += 1;
        }
        passes = passes.wrapping_add(1);
        if done >= options.requests || (passes.is_multiple_of(64) && start.elapsed() >= time) {
            return drain(client).map(|rest| done + rest);
        }
    }
}

fn fill(ring: &mut Ring, options: &Options, sectors: u64, random: &mut u64) -> bool {
    let mut submitted = false;
    while ring.has_room() {
        // xorshift64 (Marsaglia 2003): cheap, and not predictable for a prefetcher.
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        ring.submit(Request::Read { sector: (*random % sectors) & !7, bytes: options.shape.bytes });
        submitted = true;
    }
    submitted
}

fn reap(ring: &mut Ring) -> Result<u64, Error> {
    let mut done = 0;
    while let Some(request) = ring.reap() {
        check(request.status)?;
        done += 1;
    }
    Ok(done)
}

fn check(status: u8) -> Result<(), Error> {
    if status == 0 { Ok(()) } else { Err(format!("a read ended with status {status}").into()) }
}

/// Waits for all requests in flight.
fn drain(client: &mut Client) -> Result<u64, Error> {
    let mut done = 0;
    for ring in &mut client.rings {
        while !ring.is_idle() {
            let request = ring.wait(Duration::from_secs(20))?.ok_or("a read did not end")?;
            check(request.status)?;
            done += 1;
        }
    }
    Ok(done)
}

/// The kernel's counters of the server.
#[derive(Default)]
struct ServerUsage {
    /// User and system time of all threads, seconds.
    cpu: f64,
    /// Context switches of all threads.
    switches: u64,
    rss_kib: u64,
}

impl ServerUsage {
    fn now(pid: Option<u32>) -> Result<Self, Error> {
        let Some(pid) = pid else { return Ok(Self::default()) };
        let mut sum = Self::default();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // CPU time in nanoseconds. utime and stime only count ticks. proc_pid_schedstat(5)
            let schedstat = std::fs::read_to_string(task.join("schedstat"))?;
            let nanoseconds: f64 = schedstat.split(' ').next().ok_or("an empty schedstat")?.parse()?;
            sum.cpu += nanoseconds / 1e9;
            let status = std::fs::read_to_string(task.join("status"))?;
            let field = |name: &str| -> Result<u64, Error> {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).ok_or(format!("no {name}"))?;
                Ok(line.trim().trim_end_matches(" kB").parse()?)
            };
            sum.switches += field("voluntary_ctxt_switches:")? + field("nonvoluntary_ctxt_switches:")?;
            sum.rss_kib = field("VmRSS:")?;
        }
        Ok(sum)
    }
}
