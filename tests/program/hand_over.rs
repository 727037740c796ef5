//! A process hands its session over to another one, under the load of a virtual machine that must not notice anything.

mod fake_successor;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use testbed::client::{Region, Shape};
use testbed::dirty_pages;
use testbed::kills::Background;
use vhost_device_vfio::placement::CpuList;

use crate::process::{LIMIT, PROGRAM, Process};
use crate::sandbox::threads;
use fake_successor::FakeSuccessor;

/// The processes that serve one disk, one after the other.
struct Relay {
    directory: PathBuf,
    device: String,
    running: Process,
}

/// Arguments of each process: the first listens, the others take over.
fn arguments<'a>(directory: &Path, device: &'a str, queues: &'a str) -> Vec<String> {
    let path = |name| directory.join(name).display().to_string();
    let words = ["--socket-path", &path("socket"), "--handover-socket", &path("handover"), "--device", device];
    words.into_iter().chain(["--queues", queues]).map(str::to_owned).collect()
}

fn wait_for_successor_socket(process: &mut Process) {
    process.wait_until("a successor can connect", |process| process.log().contains("successors may connect"));
}

fn start(words: &[String]) -> Process {
    Process::start(&words.iter().map(String::as_str).collect::<Vec<_>>())
}

impl Relay {
    /// Starts the first process, on an empty disk.
    fn start() -> Self {
        Self::with("latency=100us,order=random,seed=1")
    }

    fn with(options: &str) -> Self {
        let mut first = Process::start(&[
            "--socket-path",
            "DIR/socket",
            "--handover-socket",
            "DIR/handover",
            "--device",
            &format!("emulated:file=DIR/disk,create=on,size={},{options}", Background::DISK),
            "--queues",
            "2",
        ]);
        first.wait_for_socket();
        wait_for_successor_socket(&mut first);
        let directory = first.path("");
        let device =
            format!("emulated:file={},create=on,size={},{options}", directory.join("disk").display(), Background::DISK);
        Self { directory, device, running: first }
    }

    fn handover(&self) -> PathBuf {
        self.directory.join("handover")
    }

    /// A load on both queues.
    fn load(&self, packed: bool) -> Background {
        let shape = Shape { queues: 2, depth: 32, bytes: 32 << 10, packed, ..Shape::default() };
        let socket = std::os::unix::net::UnixStream::connect(self.directory.join("socket")).unwrap();
        let region = if packed { Region::None } else { Region::Kept };
        Background::start(socket, shape, region, 1)
            .unwrap_or_else(|error| panic!("{error}; its log:\n{}", self.running.log()))
    }

    /// A process that asks for the session, with other arguments appended.
    fn successor(&self, device: &str, queues: &str) -> Process {
        let mut words = arguments(&self.directory, device, queues);
        words.extend(["--takeover".to_owned(), self.handover().display().to_string()]);
        start(&words)
    }

    /// Hands over to the next process; returns the former one's log.
    fn hand_over(&mut self) -> (String, Process) {
        let mut next = self.successor(&self.device, "2");
        next.wait_until("it has taken over", |next| next.log().contains("taken over; requests waited"));
        let mut former = std::mem::replace(&mut self.running, next);
        let output = former.wait_for_exit();
        assert!(output.status.success(), "{:?}: {}", output.status, output.log);
        (output.log, former)
    }
}

/// The log moves with the session.
#[test]
fn a_successor_marks_dirty_pages_in_the_same_log() {
    for kind in [0, 1] {
        let mut relay = Relay::start();
        let options = dirty_pages::Options::new(PROGRAM.into(), 6000, kind);
        let socket = std::os::unix::net::UnixStream::connect(relay.directory.join("socket")).unwrap();

        let report = dirty_pages::run_over(socket, &options, || {
            relay.hand_over();
            Ok(None)
        });

        println!("{}", report.unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log())));
        assert!(relay.running.stop().status.success());
    }
}

#[test]
fn a_successor_goes_on_under_load_and_nothing_is_lost() {
    for packed in [false, true] {
        let mut relay = Relay::start();
        let load = relay.load(packed);
        load.progresses(500);

        let (log, _former) = relay.hand_over();
        load.progresses(500);

        let gap = load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
        println!("longest time between two completions: {gap:?}");
        assert!(log.contains("handed over to process"), "{log}");
        let since = log.split_once("asks to take over").unwrap().1;
        assert!(!since.contains("front-end disconnected"), "{log}");
        assert!(relay.running.stop().status.success());
    }
}

/// Twenty, or as many as `HAND_OVERS` says.
#[test]
fn twenty_hand_overs_in_a_row_leave_nothing_behind() {
    let count = std::env::var("HAND_OVERS").map_or(20, |count| count.parse().unwrap());
    for packed in [false, true] {
        let mut relay = Relay::start();
        let load = relay.load(packed);
        // Its directory holds the sockets and the disk.
        let mut first = None;
        let (mut usage, mut waits) = (Vec::new(), Vec::new());
        for _ in 0..count {
            load.progresses(100);
            let (_, former) = relay.hand_over();
            first.get_or_insert(former);
            load.progresses(100);
            usage.push(relay.running.usage());
            waits.push(wait(&relay.running.log()));
        }
        let gap = load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
        waits.sort_unstable();
        println!(
            "{count} hand-overs, packed {packed}: requests waited {} ms, {} at most; longest time between two completions: {gap:?}",
            waits[count / 2],
            waits[count - 1]
        );
        let (earlier, later) = usage.split_at(count / 2);
        assert!(later.iter().max() <= earlier.iter().max(), "descriptors and threads: {usage:?}");
        assert!(relay.running.stop().status.success());
        assert!(!relay.directory.join("socket").exists() && !relay.handover().exists(), "the last one removes them");
    }
}

#[test]
fn the_workers_of_a_successor_run_where_its_command_line_says() {
    let mut relay = Relay::start();
    let load = relay.load(false);
    load.progresses(100);
    let last = threads(relay.running.id())[0].1["Cpus_allowed_list"].parse::<CpuList>().unwrap().iter().last();
    let last = last.unwrap().to_string();
    let mut words = arguments(&relay.directory, &relay.device, "2");
    words.extend(["--takeover".to_owned(), relay.handover().display().to_string(), "--cpus".to_owned(), last.clone()]);

    let mut next = start(&words);
    next.wait_until("it has taken over", |next| next.log().contains("taken over; requests waited"));
    let _former = std::mem::replace(&mut relay.running, next).wait_for_exit();
    load.progresses(100);

    let threads = threads(relay.running.id());
    let workers: Vec<_> = threads.iter().filter(|(name, _)| name.starts_with("vdv-worker-")).collect();
    assert_eq!(workers.len(), 2);
    for (name, status) in workers {
        assert_eq!(status["Cpus_allowed_list"], last, "{name}");
    }
    load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
}

#[test]
fn sigusr2_starts_the_installed_program_and_hands_over_to_it() {
    let mut relay = Relay::start();
    let load = relay.load(false);
    load.progresses(200);

    relay.running.signal(Signal::USR2);
    let output = relay.running.wait_for_exit();
    load.progresses(500);

    let gap = load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
    println!("longest time between two completions: {gap:?}");
    assert!(output.status.success(), "{}", output.log);
    let successor = successor(&output.log);
    // The successor is nobody's child here, so its end is seen in the file system.
    rustix::process::kill_process(rustix::process::Pid::from_raw(successor).unwrap(), Signal::TERM).unwrap();
    let gone = || !relay.directory.join("socket").exists();
    wait_until(gone);
    assert!(relay.running.log().contains("statistics: "), "{}", relay.running.log());
}

/// How long requests waited while a successor took over, in ms, as its log says.
fn wait(log: &str) -> u64 {
    let (_, time) = log.split_once("taken over; requests waited ").unwrap();
    time.split_once(' ').unwrap().0.parse().unwrap()
}

/// The process that the log says has taken over.
fn successor(log: &str) -> i32 {
    let rest = log.split_once("handed over to process ").unwrap_or_else(|| panic!("{log}")).1;
    rest.split(',').next().unwrap().parse().unwrap()
}

fn wait_until(holds: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_disk_without_a_front_end_is_handed_over_and_serves_the_next_one() {
    let mut relay = Relay::start();
    let (_, _former) = relay.hand_over();
    let load = relay.load(false);
    load.progresses(100);
    load.finish().unwrap();
}

#[test]
fn a_successor_that_dies_at_any_step_changes_nothing() {
    let relay = Relay::start();
    let load = relay.load(false);
    for (step, kept) in FakeSuccessor::STEPS.into_iter().zip(1..) {
        load.progresses(100);
        let mut fake = FakeSuccessor::start(step, &relay.handover(), &relay.device);
        fake.wait_for_end();
        let going_on = "; going on";
        let log = || relay.running.log();
        if !["hello", "before-hello", "garbage"].contains(&step) {
            wait_until(|| log().matches(going_on).count() + log().matches("may not take over").count() >= kept);
        }
        load.progresses(100);
    }
    load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
}

#[test]
fn a_successor_that_is_silent_at_any_step_is_ended_and_nothing_changes() {
    let relay = Relay::start();
    let load = relay.load(false);
    let mut fakes: Vec<FakeSuccessor> = Vec::new();
    for step in ["silent-before-ready", "silent-after-go"] {
        load.progresses(100);
        let mut fake = FakeSuccessor::start(step, &relay.handover(), &relay.device);
        // It does not end by itself.
        fake.wait_for_end();
        load.progresses(100);
        fakes.push(fake);
    }
    let gap = load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", relay.running.log()));
    println!("longest time between two completions: {gap:?}");
    let log = relay.running.log();
    assert_eq!(log.matches("silent for 10s").count(), 2, "{log}");
}

#[test]
fn another_device_other_queues_and_a_disk_in_memory_are_refused() {
    let relay = Relay::start();
    let load = relay.load(false);
    let other = relay.device.replace("seed=1", "seed=2");
    for (device, queues, reason) in [
        (&other, "2", format!("this process has --device {}, the successor {other}", relay.device)),
        (&relay.device, "4", "this process has --queues 2, the successor 4".to_owned()),
    ] {
        let output = relay.successor(device, queues).wait_for_exit();
        assert_eq!(output.status.code(), Some(1));
        assert!(output.log.contains(&reason), "{reason} is not in:\n{}", output.log);
        assert!(relay.running.log().contains(&reason), "{}", relay.running.log());
    }
    load.progresses(100);
    load.finish().unwrap();

    let mut memory = Process::serve_with("size=1M", &["--handover-socket", "DIR/handover"]);
    wait_for_successor_socket(&mut memory);
    let path = memory.path("handover").display().to_string();
    let successor = ["--takeover", &path, "--device", "emulated:size=1M", "--queues", "2"];
    let output = Process::run(&successor);
    assert!(output.log.contains("the disk is memory of this process; give the emulated drive file="), "{}", output.log);
    let mut client = memory.client();
    client.write(0, &[1; 512]).unwrap();
    drop(client);
    let output = memory.stop();
    assert!(output.status.success());
    assert!(output.log.contains("recoveries=0 "), "nothing was stopped for a refusal:\n{}", output.log);
}

#[test]
fn nobody_to_take_over_from_is_an_error_that_names_the_socket() {
    let output = Process::run(&["--takeover", "DIR/none", "--device", "emulated:size=1M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.log.contains("/none: connect: No such file"), "{}", output.log);
}
