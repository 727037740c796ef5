//! `load SOCKET OPTION…`: reads of a vhost-user-blk disk, as many at a time as asked for, and what they cost the server.
//! One line of `name=value` pairs on standard output; `scripts/bench` makes tables of them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use testbed::client::{Client, Error, Request, Ring, Shape};

const USAGE: &str = "usage: load SOCKET [--depth N] [--queues N] [--bytes N] [--seconds S] [--requests N] \
    [--pid SERVER] [--packed] [--sleep] [--idle]";

/// What was asked for.
struct Wanted {
    socket: PathBuf,
    shape: Shape,
    /// How long, and how many requests at most.
    time: Duration,
    requests: u64,
    server: Option<u32>,
    sleep: bool,
    /// Connected, and nothing asked for.
    idle: bool,
}

fn main() -> ExitCode {
    match wanted().and_then(|wanted| run(&wanted)) {
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

fn wanted() -> Result<Wanted, Error> {
    let mut words = std::env::args().skip(1);
    let socket = words.next().ok_or(USAGE)?.into();
    let shape = Shape { depth: 1, bytes: 4096, ..Shape::default() };
    let mut wanted = Wanted {
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
            "--depth" => wanted.shape.depth = value()?.parse()?,
            "--queues" => wanted.shape.queues = value()?.parse()?,
            "--bytes" => wanted.shape.bytes = value()?.parse()?,
            "--seconds" => wanted.time = Duration::from_secs_f64(value()?.parse()?),
            "--requests" => (wanted.requests, wanted.time) = (value()?.parse()?, Duration::MAX),
            "--pid" => wanted.server = Some(value()?.parse()?),
            "--packed" => wanted.shape.packed = true,
            "--idle" => wanted.idle = true,
            "--sleep" => wanted.sleep = true,
            _ => return Err(USAGE.into()),
        }
    }
    Ok(wanted)
}

fn run(wanted: &Wanted) -> Result<String, Error> {
    let mut client = Client::connect(&wanted.socket, wanted.shape)?;
    let sectors = client.capacity() - wanted.shape.bytes as u64 / 512;
    if wanted.requests == u64::MAX {
        // Long enough for the server to have touched everything it will touch.
        drive(&mut client, wanted, sectors, Duration::from_millis(200))?;
    }
    if wanted.idle {
        return idle(wanted);
    }
    let kicks: u64 = client.rings.iter().map(|ring| ring.kicks).sum();
    let (before, start) = (Server::now(wanted.server)?, Instant::now());
    let done = drive(&mut client, wanted, sectors, wanted.time)?;
    let (elapsed, after) = (start.elapsed().as_secs_f64(), Server::now(wanted.server)?);
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

/// What a server costs while its client wants nothing of it.
fn idle(wanted: &Wanted) -> Result<String, Error> {
    let (before, start) = (Server::now(wanted.server)?, Instant::now());
    std::thread::sleep(wanted.time);
    let after = Server::now(wanted.server)?;
    let percent = 100.0 * (after.cpu - before.cpu) / start.elapsed().as_secs_f64();
    Ok(format!("idle_percent={percent:.2} rss_kib={}", after.rss_kib))
}

/// Keeps every ring full for `time`; how many requests have ended by then.
fn drive(client: &mut Client, wanted: &Wanted, sectors: u64, time: Duration) -> Result<u64, Error> {
    let (mut random, mut done, start) = (0x9e37_79b9_7f4a_7c15_u64, 0, Instant::now());
    let mut looked = 0_u32;
    loop {
        for ring in &mut client.rings {
            done += reap(ring)?;
            if fill(ring, wanted, sectors, &mut random) {
                ring.publish();
                if !wanted.sleep {
                    ring.suppress_calls();
                }
            }
        }
        if wanted.sleep
            && let Some(ended) = client.rings[0].wait(Duration::from_secs(20))?
        {
            check(ended.status)?;
            done += 1;
        }
        looked = looked.wrapping_add(1);
        if done >= wanted.requests || (looked.is_multiple_of(64) && start.elapsed() >= time) {
            return drain(client).map(|rest| done + rest);
        }
    }
}

fn fill(ring: &mut Ring, wanted: &Wanted, sectors: u64, random: &mut u64) -> bool {
    let mut some = false;
    while ring.has_room() {
        // xorshift64 (Marsaglia 2003): cheap, and no prefetcher guesses it.
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        ring.submit(Request::Read { sector: (*random % sectors) & !7, bytes: wanted.shape.bytes });
        some = true;
    }
    some
}

fn reap(ring: &mut Ring) -> Result<u64, Error> {
    let mut done = 0;
    while let Some(ended) = ring.reap() {
        check(ended.status)?;
        done += 1;
    }
    Ok(done)
}

fn check(status: u8) -> Result<(), Error> {
    if status == 0 { Ok(()) } else { Err(format!("a read ended with status {status}").into()) }
}

/// Waits for everything in flight.
fn drain(client: &mut Client) -> Result<u64, Error> {
    let mut done = 0;
    for ring in &mut client.rings {
        while !ring.is_idle() {
            let ended = ring.wait(Duration::from_secs(20))?.ok_or("a read did not end")?;
            check(ended.status)?;
            done += 1;
        }
    }
    Ok(done)
}

/// What the kernel counts for the server.
#[derive(Default)]
struct Server {
    /// Seconds, user and system, of all threads.
    cpu: f64,
    /// Context switches of all threads.
    switches: u64,
    rss_kib: u64,
}

impl Server {
    fn now(pid: Option<u32>) -> Result<Self, Error> {
        let Some(pid) = pid else { return Ok(Self::default()) };
        let mut sum = Self::default();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            // Nanoseconds on a processor: exact, where utime and stime count ticks (proc_pid_schedstat(5)).
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
