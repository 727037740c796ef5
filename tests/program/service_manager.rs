//! A service manager restarts the program and keeps its descriptors, as systemd does: `FileDescriptorStoreMax=`, `Restart=`. The
//! front-end must not notice a restart, and after a crash only if it keeps a record of its requests in flight.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use testbed::client::{Client, Region, Shape};
use testbed::kills::Background;
use vhost_device_vfio::handover::FdKey;
use vmm_sys_util::tempdir::TempDir;

use crate::process::{PROGRAM, Process};

/// What a service manager keeps.
#[derive(Default)]
struct Kept {
    stored: Vec<(String, OwnedFd)>,
    /// All other lines that it has received.
    lines: Vec<String>,
}

/// A small service manager.
struct Manager {
    directory: TempDir,
    listener: UnixListener,
    kept: Arc<Mutex<Kept>>,
}

impl Manager {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.as_path().join("socket")).unwrap();
        let notify = UnixDatagram::bind(directory.as_path().join("notify")).unwrap();
        let kept = Arc::<Mutex<Kept>>::default();
        let mine = Arc::clone(&kept);
        // It ends with the test program.
        std::thread::spawn(move || {
            while let Ok((text, fds)) = receive(&notify) {
                mine.lock().unwrap().handle(&text, fds);
            }
        });
        Self { directory, listener, kept }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    /// Starts the program with everything that is stored.
    fn start(&self) -> Process {
        let device = format!(
            "emulated:file={},create=on,size={},latency=100us,order=random,seed=1",
            self.path("disk").display(),
            Background::DISK
        );
        self.start_with(&["--device", &device, "--queues", "2"])
    }

    /// The same with other arguments.
    fn start_with(&self, arguments: &[&str]) -> Process {
        let kept = self.kept.lock().unwrap();
        let names: Vec<_> = kept.stored.iter().map(|(name, _)| name.as_str()).collect();
        let names = [&["disk.socket"], names.as_slice()].concat();
        let fds = kept.stored.iter().map(|(_, fd)| fd.try_clone().unwrap());
        let fds = std::iter::once(self.listener.try_clone().unwrap().into()).chain(fds);
        let mappings = (3..).zip(fds).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
        let mut shell = Command::new("/bin/sh");
        let variables = format!("LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}", names.len(), names.join(":"));
        shell.arg("-c").arg(format!("{variables} exec \"$0\" \"$@\"")).arg(PROGRAM);
        shell.env("NOTIFY_SOCKET", self.path("notify")).env("FDSTORE", "500").env("WATCHDOG_USEC", "20000");
        shell.fd_mappings(mappings).unwrap();
        drop(kept);
        let mut process = Process::spawn(shell, arguments);
        process.wait_until("it is ready", |process| process.log().contains("serving emulated"));
        process
    }

    fn load(&self, packed: bool, region: Region) -> Background {
        let shape = Shape { queues: 2, depth: 32, bytes: 32 << 10, packed, ..Shape::default() };
        Background::start(UnixStream::connect(self.path("socket")).unwrap(), shape, region, 1).unwrap()
    }

    fn stored(&self) -> usize {
        self.kept.lock().unwrap().stored.len()
    }
}

impl Kept {
    fn handle(&mut self, text: &str, fds: Vec<OwnedFd>) {
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
        if text.lines().any(|line| line == "FDSTORE=1") {
            // systemd ignores a file that it has already, whatever its name.
            let key = |fd: &OwnedFd| FdKey::of(fd).unwrap();
            let fds = fds.into_iter().filter(|fd| !self.stored.iter().any(|(_, kept)| key(kept) == key(fd)));
            let fds: Vec<_> = fds.collect();
            self.stored.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
            self.stored.retain(|(stored, _)| *stored != name);
        } else {
            self.lines.extend(text.lines().map(str::to_owned));
        }
    }
}

fn receive(notify: &UnixDatagram) -> rustix::io::Result<(String, Vec<OwnedFd>)> {
    let (mut bytes, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let seen = recvmsg(notify, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((String::from_utf8_lossy(&bytes[..seen.bytes]).into_owned(), fds))
}

fn explain<T>(result: Result<T, testbed::client::Error>, process: &Process) -> T {
    result.unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()))
}

#[test]
fn a_restart_by_sigterm_keeps_the_front_end_and_loses_nothing() {
    for packed in [false, true] {
        let manager = Manager::new();
        let mut process = manager.start();
        let load = manager.load(packed, Region::None);
        for _ in 0..5 {
            load.progresses(200);
            let output = process.stop();
            assert!(output.status.success(), "{}", output.log);
            assert!(output.log.contains("the service manager keeps"), "{}", output.log);
            process = manager.start();
        }
        load.progresses(200);
        let gap = explain(load.finish(), &process);
        println!("longest time between two completions: {gap:?}");
        assert!(process.log().contains("which has stopped"), "{}", process.log());
        process.wait_until("nothing but the text is stored", |_| manager.stored() == 1);
        process.stop();
        let lines = &manager.kept.lock().unwrap().lines;
        assert!(lines.contains(&"READY=1".to_owned()) && lines.contains(&"STOPPING=1".to_owned()), "{lines:?}");
    }
}

#[test]
fn a_crash_keeps_a_front_end_that_records_its_requests_and_loses_nothing() {
    for packed in [false, true] {
        let manager = Manager::new();
        let mut process = manager.start();
        let load = manager.load(packed, Region::Kept);
        for _ in 0..5 {
            load.progresses(200);
            process.signal(Signal::KILL);
            process.wait_for_exit();
            process = manager.start();
            process.wait_until("it goes on", |process| process.log().contains("which has crashed"));
        }
        load.progresses(200);
        let gap = explain(load.finish(), &process);
        println!("longest time between two completions: {gap:?}");
    }
}

#[test]
fn a_successor_keeps_the_session_in_the_store_and_a_crash_of_it_loses_nothing() {
    let manager = Manager::new();
    let mut process = manager.start();
    let load = manager.load(false, Region::Kept);
    load.progresses(200);
    process.signal(Signal::USR2);
    let log = process.wait_for_exit().log;
    let pid = log.split_once("handed over to process ").unwrap().1.split(',').next().unwrap().to_owned();
    load.progresses(200);
    let main_pid = format!("MAINPID={pid}");
    {
        let lines = &manager.kept.lock().unwrap().lines;
        let told = lines.iter().position(|line| *line == main_pid).unwrap_or_else(|| panic!("{lines:?}; {log}"));
        assert!(lines[told..].contains(&"BARRIER=1".to_owned()), "it has ended before it was heard: {lines:?}");
    }

    let successor = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let exit = pidfd_open(successor, PidfdFlags::empty()).unwrap();
    kill_process(successor, Signal::KILL).unwrap();
    // Until then it holds the lock on the drive's file.
    poll(&mut [PollFd::new(&exit, PollFlags::IN)], None).unwrap();
    let mut next = manager.start();

    next.wait_until("it goes on", |next| next.log().contains("which has crashed"));
    load.progresses(200);
    explain(load.finish(), &next);
    next.wait_until("nothing but the text is stored", |_| manager.stored() == 1);
}

#[test]
fn a_crash_disconnects_a_front_end_without_a_record() {
    let manager = Manager::new();
    let mut process = manager.start();
    let load = manager.load(false, Region::None);
    load.progresses(200);
    process.signal(Signal::KILL);
    process.wait_for_exit();

    let process = manager.start();

    let error = load.finish().unwrap_err().to_string();
    assert!(error.contains("disconnected"), "{error}");
    assert!(process.log().contains("keeps no record of requests in flight"), "{}", process.log());
    let mut process = process;
    process.wait_until("the store is empty but for the text", |_| manager.stored() == 1);
}

#[test]
fn front_ends_that_come_and_go_leave_nothing_in_the_store() {
    let manager = Manager::new();
    let mut process = manager.start();
    for _ in 0..3 {
        let client = Client::connect(&manager.path("socket"), Shape::default()).unwrap();
        process.wait_until("the session is stored", |_| manager.stored() > 5);
        drop(client);
        process.wait_until("it is removed", |_| manager.stored() == 1);
    }
    assert!(process.stop().status.success());
}

#[test]
fn the_manager_is_told_who_is_served_and_that_the_program_is_alive() {
    let manager = Manager::new();
    let mut process = manager.start();
    let told = |line: &str| {
        let kept = manager.kept.lock().unwrap();
        kept.lines.iter().any(|known| known.starts_with("STATUS=emulated: ") && known.contains(line))
    };
    let alive = || manager.kept.lock().unwrap().lines.iter().filter(|line| *line == "WATCHDOG=1").count();
    process.wait_until("nobody is served", |_| told("no front-end; DMA coherent"));
    let load = manager.load(false, Region::None);
    load.progresses(10);
    process.wait_until("the front-end is named", |_| told(&format!("(pid {}, uid ", std::process::id())));
    let before = alive();
    process.wait_until("it is alive while it serves", |_| alive() > before + 2);
    explain(load.finish(), &process);

    process.signal(Signal::USR2);
    let log = process.wait_for_exit().log;
    assert!(log.contains("handed over to process"), "{log}");
    let before = alive();
    let pid = log.split_once("handed over to process ").unwrap().1.split(',').next().unwrap().parse().unwrap();
    while alive() <= before + 2 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_process_with_several_namespaces_keeps_nothing_and_leaves_nothing_of_the_one_before() {
    let manager = Manager::new();
    let mut process = manager.start();
    let client = Client::connect(&manager.path("socket"), Shape::default()).unwrap();
    assert!(process.stop().status.success());
    let kept = manager.stored();
    drop(client);

    let arguments =
        "--device emulated:namespaces=2,size=1M --namespace 1 --socket-path DIR/a --namespace 2 --socket-path DIR/b";
    let mut process = manager.start_with(&arguments.split(' ').collect::<Vec<_>>());
    process.wait_until("it serves both", |process| process.log().contains("namespace 2, disk 1, on"));
    let _client = Client::connect(&process.path("a"), Shape::default()).unwrap();

    process.wait_until("nothing is kept but the empty text", |_| manager.stored() <= 1);
    assert!(kept > 1, "{kept} descriptors were kept");
    assert!(process.log().contains("no session is kept with several namespaces"), "{}", process.log());
}
