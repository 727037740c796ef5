//! Each refused call ends a process: the test program itself, started again, in a thread with the filter of a role.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use rustix::event::{EventfdFlags, eventfd};

use super::*;

const ATTEMPT: &str = "SANDBOX_ATTEMPT";

/// What a thread of a role tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    Open,
    Connect,
    Listen,
    Execute,
    StartProcess,
    StartThread,
    MapExecutable,
    MakeExecutable,
    Ioctl,
    Signal,
    Work,
}

const ATTEMPTS: [Attempt; 11] = [
    Attempt::Open,
    Attempt::Connect,
    Attempt::Listen,
    Attempt::Execute,
    Attempt::StartProcess,
    Attempt::StartThread,
    Attempt::MapExecutable,
    Attempt::MakeExecutable,
    Attempt::Ioctl,
    Attempt::Signal,
    Attempt::Work,
];

impl Attempt {
    /// `event` is an open eventfd.
    fn run(self, event: &OwnedFd) -> io::Result<()> {
        match self {
            Self::Open => File::open("/bin/sh").map(drop),
            Self::Connect => UnixStream::connect("/nonexistent").map(drop),
            Self::Listen => TcpListener::bind("127.0.0.1:0").map(drop),
            Self::Execute => {
                let program = CString::new("/bin/true")?;
                crate::sys::attempt::execute(&program)
            }
            Self::StartProcess => crate::sys::attempt::start_process(),
            Self::StartThread => std::thread::Builder::new().spawn(|| ()).map(drop),
            Self::MapExecutable => crate::sys::attempt::map(true),
            Self::MakeExecutable => crate::sys::attempt::make_executable(),
            Self::Ioctl => crate::sys::attempt::ioctl(event.as_raw_fd()),
            Self::Signal => crate::sys::attempt::signal_init(),
            Self::Work => work(event),
        }
    }
}

/// What a worker does all the time.
fn work(event: &OwnedFd) -> io::Result<()> {
    rustix::io::write(event, &1_u64.to_ne_bytes())?;
    rustix::io::read(event, &mut [0; 8])?;
    let mut many = Vec::new();
    for size in 1..200 {
        many.push(vec![1_u8; size * 4096]);
    }
    drop(many);
    crate::sys::attempt::map(false)?;
    std::thread::sleep(std::time::Duration::from_millis(1));
    log::error!("a line");
    Ok(())
}

/// In the process that is started for it: enters the role of `SANDBOX_ATTEMPT` on a thread, and tries.
#[test]
fn attempt() {
    let Ok(words) = std::env::var(ATTEMPT) else { return };
    let (role, attempt) = words.split_once(' ').unwrap();
    let role = *ROLES.iter().find(|known| format!("{known:?}") == role).unwrap();
    let attempt = *ATTEMPTS.iter().find(|known| format!("{known:?}") == attempt).unwrap();
    prepare(Mode::Strict, &Paths::default(), false).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let body = move || {
        enter(role);
        match attempt.run(&event) {
            Ok(()) => println!("done"),
            Err(error) => println!("answered {}", error.kind()),
        }
    };
    std::thread::Builder::new().name("the-thread".into()).spawn(body).unwrap().join().unwrap();
}

fn attempt_of(role: Role, attempt: Attempt) -> Output {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "sandbox::tests::attempt", "--nocapture"]).env(ATTEMPT, format!("{role:?} {attempt:?}"));
    again.output().unwrap()
}

/// The process ends by SIGSYS, and its last words name the thread and the call.
fn dies(role: Role, attempt: Attempt, calls: &[i64]) {
    let output = attempt_of(role, attempt);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?} {attempt:?}: {:?} {text}", output.status);
    let named = calls.iter().any(|call| text.contains(&format!("thread the-thread made system call {call}, which")));
    assert!(named, "{role:?} {attempt:?}, one of {calls:?}: {text}");
}

/// It goes on.
fn answers(role: Role, attempt: Attempt, answer: &str) {
    let output = attempt_of(role, attempt);
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && text.contains(answer), "{role:?} {attempt:?}: {:?} {text}", output.status);
}

const WITHOUT_FILES: [Role; 2] = [Role::Worker, Role::Emulation];

#[test]
fn a_worker_that_opens_a_file_ends_the_process() {
    for role in WITHOUT_FILES {
        dies(role, Attempt::Open, &[libc::SYS_openat]);
    }
}

#[test]
fn a_worker_that_connects_ends_the_process() {
    for role in WITHOUT_FILES {
        dies(role, Attempt::Connect, &[libc::SYS_socket, libc::SYS_connect]);
    }
}

/// The C library starts a thread with all signals blocked, so the kernel ends the process without the handler's words.
#[test]
fn a_worker_that_starts_a_thread_ends_the_process() {
    for role in WITHOUT_FILES {
        let output = attempt_of(role, Attempt::StartThread);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?}: {:?}", output.status);
    }
}

#[test]
fn whoever_executes_a_program_ends_the_process() {
    for role in ROLES {
        dies(role, Attempt::Execute, &[libc::SYS_execve]);
    }
}

#[test]
fn whoever_starts_a_process_ends_this_one() {
    for role in ROLES {
        dies(role, Attempt::StartProcess, &[libc::SYS_clone]);
    }
}

#[test]
fn whoever_maps_executable_memory_ends_the_process() {
    for role in ROLES {
        dies(role, Attempt::MapExecutable, &[libc::SYS_mmap]);
    }
}

#[test]
fn whoever_makes_memory_executable_ends_the_process() {
    for role in ROLES {
        dies(role, Attempt::MakeExecutable, &[libc::SYS_mprotect]);
    }
}

#[test]
fn whoever_uses_an_ioctl_that_is_not_listed_ends_the_process() {
    for role in ROLES {
        dies(role, Attempt::Ioctl, &[libc::SYS_ioctl]);
    }
}

#[test]
fn whoever_signals_another_process_ends_this_one() {
    for role in ROLES {
        dies(role, Attempt::Signal, &[libc::SYS_kill]);
    }
}

#[test]
fn a_guard_that_listens_ends_the_process() {
    dies(Role::Guard, Attempt::Listen, &[libc::SYS_bind]);
}

#[test]
fn a_file_that_is_not_named_cannot_be_opened_by_the_threads_that_open_files() {
    for role in [Role::Guard, Role::Control] {
        answers(role, Attempt::Open, "answered permission denied");
    }
}

#[test]
fn a_port_that_is_not_named_cannot_be_listened_on() {
    answers(Role::Control, Attempt::Listen, "answered permission denied");
}

#[test]
fn the_threads_of_all_roles_do_their_work() {
    for role in ROLES {
        answers(role, Attempt::Work, "done");
    }
    for role in [Role::Guard, Role::Control] {
        answers(role, Attempt::StartThread, "done");
        answers(role, Attempt::Connect, "answered entity not found");
    }
}

/// The `status` of the thread in procfs.
fn status_in(role: Role) -> String {
    let Role::Control = role else { panic!("the others cannot read it") };
    prepare(Mode::Strict, &Paths { readable: vec!["/proc".into()], ..Paths::default() }, false).unwrap();
    std::thread::spawn(move || {
        enter(role);
        std::fs::read_to_string("/proc/thread-self/status").unwrap()
    })
    .join()
    .unwrap()
}

#[test]
fn a_thread_in_its_role_has_no_capability_and_gets_no_privilege() {
    use testbed::own_process::in_own_process;
    if !in_own_process("sandbox::tests::a_thread_in_its_role_has_no_capability_and_gets_no_privilege") {
        return;
    }
    let status = status_in(Role::Control);
    for line in [
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.lines().any(|found| found == line), "{line} in {status}");
    }
}

#[test]
fn a_socket_can_be_put_where_one_is_named_and_nowhere_else() {
    use testbed::own_process::in_own_process;
    use vmm_sys_util::tempdir::TempDir;
    if !in_own_process("sandbox::tests::a_socket_can_be_put_where_one_is_named_and_nowhere_else") {
        return;
    }
    let (here, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let socket = |directory: &TempDir| directory.as_path().join("socket");
    let mut paths = Paths::default();
    paths.add_socket(&socket(&here));
    prepare(Mode::Strict, &paths, false).unwrap();
    let (allowed, refused) = (socket(&here), socket(&elsewhere));
    let attempts = move || {
        enter(Role::Control);
        let bind = |path: &Path| std::os::unix::net::UnixListener::bind(path).map(drop).map_err(|error| error.kind());
        (bind(&allowed), std::fs::remove_file(&allowed).is_ok(), bind(&refused), File::create(&allowed).is_ok())
    };
    let found = std::thread::spawn(attempts).join().unwrap();
    assert_eq!(found, (Ok(()), true, Err(io::ErrorKind::PermissionDenied), false));
}

#[test]
fn no_list_has_a_call_twice() {
    for role in ROLES {
        let mut numbers: Vec<_> = calls::of_role(role).map(|call| call.number).collect();
        numbers.sort_unstable();
        let count = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), count, "{role:?}: a condition in one list would be undone by another");
    }
}

#[test]
fn a_kernel_that_lacks_a_layer_is_named() {
    assert_eq!(
        SandboxError::Missing("landlock").to_string(),
        "this kernel lacks landlock; --sandbox auto serves without that"
    );
}

#[test]
fn a_thread_that_runs_late_enters_its_role_although_the_one_that_started_it_has_entered_another_by_then() {
    use testbed::own_process::in_own_process;
    let name = "sandbox::tests::a_thread_that_runs_late_enters_its_role_although_the_one_that_started_it_has_entered_another_by_then";
    if !in_own_process(name) {
        return;
    }
    prepare(Mode::Strict, &Paths { readable: vec!["/proc".into()], ..Paths::default() }, false).unwrap();
    let status = std::thread::spawn(|| {
        let entry = Entry::new(Role::Guard);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let late = std::thread::spawn(move || {
            wait.recv().unwrap();
            entry.enter();
            std::fs::read_to_string("/proc/thread-self/status").unwrap()
        });
        enter(Role::Control);
        go.send(()).unwrap();
        late.join().unwrap()
    });
    let status = status.join().unwrap();
    assert!(status.lines().any(|line| line == "Seccomp:\t2"), "{status}");
}
