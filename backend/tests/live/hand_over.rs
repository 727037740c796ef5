//! A function and its address space pass from one process to another. The test starts a predecessor, which serves the drive and
//! starts a successor; both write lines to the test, which also looks at the kernel's counts of pinned pages.

mod descriptions;
mod drive;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use vhost_device_vfio::acquire::AcquiredFunction;
use vhost_device_vfio::acquire::hand_over::{Accepted, Served, accept};
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::coherency::{Facts, Personality, Policy, decide};
use vhost_device_vfio::driver::Driver;
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::iommu::{KernelSpace, LiveSpace};
use vhost_device_vfio::memory::{Region, RegionSpec};
use vhost_device_vfio::vfio::{Attached, InterfaceChoice, no_snoop};

use self::drive::{BASE, Drive, receive, send};
use super::{MIB, device, page, pinned};

const GUEST: u64 = 64 * MIB;
/// What the predecessor writes to the disk.
const PREDECESSOR: u8 = 0x11;

/// The case that the test runs, in the environment of both processes.
const CASE: &str = "VDV_HAND_OVER";
/// Set in the environment of a successor's successor.
const GENERATION: &str = "VDV_HAND_OVER_GENERATION";
/// The step at which the successor dies, in its environment.
const DIES: &str = "VDV_HAND_OVER_DIES";

/// Pages pinned and unpinned since the machine started, for any purpose.
fn pins() -> (u64, u64) {
    // Makes the processors report what they have counted.
    std::fs::write("/proc/sys/vm/stat_refresh", "1").unwrap();
    let text = std::fs::read_to_string("/proc/vmstat").unwrap();
    let count = |name: &str| -> u64 {
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).expect("a counter of vmstat")
    };
    (count("nr_foll_pin_acquired "), count("nr_foll_pin_released "))
}

fn pinned_pages() -> u64 {
    let (acquired, released) = pins();
    acquired - released
}

fn policy() -> Policy {
    match std::env::var("VDV_REGIME").as_deref() {
        Ok("flushing") => Policy::Assume,
        _ => Policy::Suppress,
    }
}

/// Makes this process one whose pinned memory the kernel keeps an account of.
fn without_ipc_lock() {
    let rest = rustix::thread::CapabilitySets {
        effective: capabilities(None).unwrap().effective - CapabilitySet::IPC_LOCK,
        ..capabilities(None).unwrap()
    };
    set_capabilities(None, rest).unwrap();
}

fn limit_locked_memory(bytes: u64) {
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: None }).unwrap();
}

fn guest_memory(file: Arc<File>, bytes: u64) -> Arc<Region> {
    let gpa = Span::new(Gpa(BASE), bytes).unwrap();
    Arc::new(Region::map(RegionSpec { gpa, qva: Qva(0x7f00_0000_0000), offset: 0, file }).unwrap())
}

fn new_file(bytes: u64) -> Arc<File> {
    let file: File = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap().into();
    ftruncate(&file, bytes).unwrap();
    Arc::new(file)
}

/// Acquires the function through iommufd.
fn acquire() -> (Arc<Attached>, LiveSpace, Facts) {
    let acquired = AcquiredFunction::acquire(device(), InterfaceChoice::Iommufd).unwrap();
    let facts = acquired.evidence().facts(Personality::Mediated, policy(), false);
    match acquired.into_address_space(&facts).unwrap() {
        (function, KernelSpace::Iommufd(space)) => (Arc::new(function), space, facts),
        _ => panic!("acquired through the other interface"),
    }
}

fn served(function: &Arc<Attached>, space: &LiveSpace, facts: &Facts) -> Served {
    Served::new(device().into(), function, &KernelSpace::Iommufd(space.clone()), facts)
}

/// The name of a test of this file.
fn role(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("hand_over::{name}"), "--ignored", "--nocapture"]);
    command
}

/// Says what this process has seen. The harness prints to the same place.
fn say(line: &str) {
    println!("\nsaid: {line}");
}

fn case_is(word: &str) -> bool {
    std::env::var(CASE).unwrap_or_default().split(' ').any(|have| have == word)
}

#[test]
#[ignore = "started by the other tests of this file"]
fn predecessor() {
    prepare_process();
    let (function, space, facts) = acquire();
    let served = served(&function, &space, &facts);
    let mut drive = Drive::bring_up(function, &space, &facts);
    let bytes = if case_is("by-address") { GUEST - 100 } else { GUEST };
    let file = new_file(bytes);
    let region = guest_memory(Arc::clone(&file), bytes);
    space.add(&region).unwrap();
    drive.verify(&region, PREDECESSOR);
    say(&format!("verdict {}", decide(&facts).word()));

    // A case of several words has the successor fail at each step in turn.
    let steps = ["accepted", "mapped", "up", "fails"];
    for step in steps.iter().filter(|step| case_is(step)) {
        hand_over_in_vain(&mut drive, &served, &file, &region, step);
    }
    if !case_is("success") {
        return drive.end(&region);
    }
    hand_over(drive, served, &file, region);
}

/// Hands over to a successor, and ends.
fn hand_over(mut drive: Drive, served: Served, file: &File, region: Arc<Region>) -> ! {
    let released = pins().1;
    let disk = drive.nvme.disk_state().unwrap();
    drive.queues.clear();
    drive.nvme.quiesce().unwrap();
    let exported = served.export(!case_is("unflushed")).unwrap();
    let (mut socket, _child) = start_successor("never");
    send(&socket, &exported, &disk, file);
    assert_eq!(line(&mut socket), b'u', "the successor is up");
    let left = exported.leave();
    drive.nvme.leave(&left);
    say(&format!("unpinned until the predecessor's end {}", pins().1 - released));
    say(&format!("locked by the predecessor {}", pinned()));
    socket.write_all(b"y").unwrap();
    // All that a teardown does has no effect now.
    drive.space.remove(&region).unwrap();
    drop((drive.space, served, region));
    std::process::exit(0);
}

/// The successor's end of the socket is its standard input.
fn start_successor(dies: &str) -> (UnixStream, std::process::Child) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = role("successor");
    if std::env::var(DIES).is_ok() {
        command.env(GENERATION, "2");
    }
    let child = command.env(DIES, dies).stdin(OwnedFd::from(theirs)).spawn().unwrap();
    (ours, child)
}

fn line(socket: &mut UnixStream) -> u8 {
    let mut byte = [0];
    if socket.read_exact(&mut byte).is_ok() { byte[0] } else { 0 }
}

fn hand_over_in_vain(drive: &mut Drive, served: &Served, file: &Arc<File>, region: &Arc<Region>, step: &str) {
    let (before, mapped, released) = (pinned_pages(), drive.space.statistics().mapped, pins().1);
    let disk = drive.nvme.disk_state().unwrap();
    drive.queues.clear();
    drive.nvme.quiesce().unwrap();
    let exported = served.export(true).unwrap();
    let (mut socket, mut child) = start_successor(step);
    send(&socket, &exported, &disk, file);
    assert_eq!(line(&mut socket), 0, "the successor dies");
    assert!(!child.wait().unwrap().success());

    drive.nvme.resume().unwrap();
    exported.take_back().unwrap();
    drive.queues = drive.nvme.recover().unwrap();

    drive.verify(region, PREDECESSOR);
    assert_eq!(drive.space.statistics().mapped, mapped, "bytes mapped, after {step}");
    assert_eq!(pinned_pages(), before, "pages pinned, after {step}");
    let released = pins().1 - released;
    say(&format!("went on after {step}, unpinned {released}"));
    assert!(released < GUEST / page(), "{released} pages were unpinned after {step}: more than the drivers' own");
}

#[test]
#[ignore = "started by the other tests of this file"]
fn successor() {
    prepare_process();
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (description, disk, descriptors, guest) = receive(&mut socket);
    let Accepted { function, space, facts, take_over, name: _ } =
        accept(&description, descriptors, (Personality::Mediated, policy(), false)).unwrap();
    die_if("accepted");
    let bytes = if case_is("by-address") { GUEST - 100 } else { GUEST };
    let guest = Arc::new(guest);
    let region = guest_memory(Arc::clone(&guest), bytes);
    let maps = space.statistics().maps;
    assert!(take_over.ready().is_err(), "not all memory is adopted");
    space.add(&region).unwrap();
    assert_eq!(space.statistics().maps, maps, "pieces that were mapped");
    say(&format!("flushed again {}", space.statistics().flushed_at_map));
    let buffer = space.buffer(MIB as usize).unwrap();
    die_if("mapped");
    let function = Arc::new(function);
    let served = served(&function, &space, &facts);
    let mut drive = Drive::bring_up(function, &space, &facts);
    drive.nvme.continue_from(&disk).unwrap();
    drive.check(&region, PREDECESSOR);
    drive.verify(&region, 0x33);
    die_if("up");
    assert!(!dies_at("fails"), "this successor unwinds");
    take_over.ready().unwrap();
    socket.write_all(b"u").unwrap();

    assert_eq!(line(&mut socket), b'y', "the predecessor leaves");
    assert_eq!(line(&mut socket), 0, "the predecessor ends");
    drive.verify(&region, 0x44);
    take_over.complete().unwrap();
    drive.verify(&region, 0x55);
    say(&format!("locked by the successor {}", pinned()));
    drop(buffer);
    add_and_remove_memory(&space);
    if case_is("released") {
        drive = lose_and_find(drive, facts);
        drive.verify(&region, 0x66);
    }
    if case_is("twice") && std::env::var(GENERATION).is_err() {
        drive.verify(&region, PREDECESSOR);
        hand_over(drive, served, &guest, region);
    }
    drive.end(&region);
    say(&format!("locked in the end {}", pinned()));
    assert_eq!(space.statistics().mapped, 0);
    say("ended");
}

/// True if this successor ends at `step`.
fn dies_at(step: &str) -> bool {
    std::env::var(DIES).expect("started by a predecessor") == step
}

fn die_if(step: &str) {
    if dies_at(step) {
        say(&format!("dies {step}"));
        // No destructor runs, as with a signal.
        std::process::abort();
    }
}

/// New memory can be added again.
fn add_and_remove_memory(space: &dyn AddressSpace) {
    let file = new_file(MIB);
    let spec = RegionSpec { gpa: Span::new(Gpa(0), MIB).unwrap(), qva: Qva(0x6f00_0000_0000), offset: 0, file };
    let region = Arc::new(Region::map(spec).unwrap());
    space.add(&region).unwrap();
    space.remove(&region).unwrap();
}

/// The host takes the device and gives it back: its memory is unpinned, and pinned again.
fn lose_and_find(mut drive: Drive, facts: Facts) -> Drive {
    let former = drive.space.clone();
    let reacquire = move || -> anyhow::Result<Arc<dyn Function>> {
        let former = KernelSpace::Iommufd(former.clone());
        let acquired = AcquiredFunction::reacquire(device(), &former)?;
        no_snoop::apply(Arc::new(acquired.into_former_address_space(&former)?), decide(&facts)).map_err(Into::into)
    };
    drive.queues.clear();
    drive.nvme = Box::new(drive.nvme.with_reacquire(Box::new(reacquire)));
    drive.nvme.release();
    say(&format!("locked while released {}", pinned()));
    drive.queues = drive.nvme.recover().unwrap();
    drive
}

fn prepare_process() {
    env_logger::Builder::new().filter_level(log::LevelFilter::Info).target(env_logger::Target::Stdout).init();
    if case_is("accounted") || case_is("limited") {
        without_ipc_lock();
    }
    limit_locked_memory(if case_is("limited") { GUEST + 16 * MIB } else { 1 << 40 });
}

/// Runs `case`: what the processes said. Afterwards the kernel has as many pages pinned as before, and the function is free.
fn run(case: &str) -> String {
    let before = pinned_pages();
    let output = role("predecessor").env(CASE, case).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    // Until both processes have closed it.
    let output = output.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}");
    assert!(output.status.success(), "the predecessor: {}", output.status);
    assert_eq!(pinned_pages(), before, "pages pinned in the end");
    super::attach().expect("the function is free again");
    text
}

/// The number after `words` in what the processes said.
fn said(text: &str, words: &str) -> u64 {
    let found = text.lines().find_map(|line| line.strip_prefix("said: ")?.strip_prefix(words)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("nobody said: {words}"))
}

#[test]
fn the_drive_and_its_memory_pass_to_another_process_without_unpinning_guest_memory() {
    let text = run("success");
    assert!(text.contains("said: ended"), "the successor ends by itself");
    let unpinned = said(&text, "unpinned until the predecessor's end");
    assert!(unpinned < GUEST / page() / 4, "{unpinned} pages were unpinned");
}

#[test]
fn the_account_of_pinned_memory_moves_to_the_successor() {
    let text = run("success accounted");
    assert!(said(&text, "locked by the predecessor") >= GUEST);
    assert!((GUEST..2 * GUEST).contains(&said(&text, "locked by the successor")));
    assert_eq!(said(&text, "locked in the end"), 0);
}

#[test]
fn a_limit_that_the_account_would_exceed_while_it_moves_is_no_error() {
    let text = run("success limited");
    assert!(text.contains("IOMMU_IOAS_CHANGE_PROCESS: Cannot allocate memory"));
    assert!(text.contains("said: ended"));
}

#[test]
fn memory_mapped_by_its_address_outlives_the_process_that_mapped_it() {
    let text = run("success accounted by-address");
    assert!(text.contains("IOMMU_IOAS_CHANGE_PROCESS: Invalid argument"));
    assert!(text.contains("said: ended"));
}

#[test]
fn a_successor_that_dies_or_fails_at_any_step_leaves_nothing_behind() {
    let text = run("accepted mapped up fails success");
    for step in ["accepted", "mapped", "up", "fails"] {
        assert!(text.contains(&format!("said: went on after {step}")), "{step}");
    }
    assert!(text.contains("said: ended"));
}

#[test]
fn a_successor_hands_over_to_its_own_successor() {
    let text = run("success twice accounted");
    assert_eq!(text.matches("said: unpinned until the predecessor's end").count(), 2);
    assert!(text.contains("said: ended"));
}

#[test]
fn the_host_can_have_the_device_back_from_a_successor() {
    let text = run("success released accounted");
    assert_eq!(said(&text, "locked while released"), 0);
    assert!(text.contains("said: ended"));
}

#[test]
fn where_the_caches_may_hold_something_the_successor_flushes_all_guest_memory() {
    let flushes = |text: &str| if text.contains("said: verdict flush") { GUEST } else { 0 };
    let text = run("success unflushed");
    assert_eq!(said(&text, "flushed again"), flushes(&text));
    assert_eq!(said(&run("success"), "flushed again"), 0);
}
