//! A process that runs the program. All waits have a time-out, and dropping it kills the process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use testbed::client::{Client, Shape};
use vmm_sys_util::tempdir::TempDir;

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-vfio");

/// Time-out of all waits. It is long because other tests share the processors.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// The output and exit status of the program.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) log: String,
}

/// The running program and its temporary directory.
pub(crate) struct Process {
    directory: TempDir,
    child: Child,
}

impl Process {
    /// Starts the program. `DIR` in `arguments` is replaced by the temporary directory.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::spawn(Command::new(PROGRAM), arguments)
    }

    /// The same with `socket` as descriptor 3 and `variables` (shell assignments) in its environment.
    pub(crate) fn inheriting(socket: impl Into<OwnedFd>, variables: &str, arguments: &[&str]) -> Self {
        let mut shell = Command::new("/bin/sh");
        // The shell executes the program in its own process, so $$ is the program's PID.
        shell.arg("-c").arg(format!("{variables} exec \"$0\" \"$@\" 3<&0 </dev/null")).arg(PROGRAM);
        shell.stdin(socket.into());
        Self::spawn(shell, arguments)
    }

    /// Runs `command`, which executes the program.
    pub(crate) fn spawn(mut command: Command, arguments: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().to_str().unwrap();
        command.args(arguments.iter().map(|argument| argument.replace("DIR", path)));
        command.env_remove("RUST_LOG").env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        command.stdout(File::create(directory.as_path().join("stdout")).unwrap());
        command.stderr(File::create(directory.as_path().join("log")).unwrap());
        let child = command.spawn().unwrap();
        Self { directory, child }
    }

    /// Serves an emulated drive on the socket `DIR/socket`. Returns once a front-end can connect.
    pub(crate) fn serve(options: &str) -> Self {
        Self::serve_with(options, &[])
    }

    /// The same with more arguments. Returns once the sockets listen that they name, too.
    pub(crate) fn serve_with(options: &str, more: &[&str]) -> Self {
        let device = format!("emulated:{options}");
        let mut process =
            Self::start(&[&["--socket-path", "DIR/socket", "--device", &device, "--queues", "2"], more].concat());
        process.wait_for_socket();
        // The program opens all sockets before the drive.
        process.wait_until("it serves", |process| process.log().contains("] serving "));
        process
    }

    pub(crate) fn wait_for_socket(&mut self) {
        self.wait_until("it listens", |process| UnixStream::connect(process.path("socket")).is_ok());
    }

    pub(crate) fn wait_until_listening_or_ended(&mut self) {
        let start = Instant::now();
        while UnixStream::connect(self.path("socket")).is_err() && self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LIMIT, "it neither listens nor ends; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until `holds` returns true. If the process exits before, or after a time-out, the test fails with the log.
    pub(crate) fn wait_until(&mut self, condition: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            let status = self.child.try_wait().unwrap();
            assert!(
                status.is_none() && start.elapsed() < LIMIT,
                "not reached: {condition} ({status:?}); its log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The number of its descriptors and of its threads.
    pub(crate) fn usage(&self) -> [usize; 2] {
        ["fd", "task"].map(|kind| std::fs::read_dir(format!("/proc/{}/{kind}", self.child.id())).unwrap().count())
    }

    /// Its limits, as in proc(5).
    pub(crate) fn limits(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/limits", self.child.id())).unwrap()
    }

    /// The number of its file descriptors, and of its mappings of guest memory.
    pub(crate) fn descriptors_and_mappings(&self) -> [usize; 2] {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let maps = std::fs::read_to_string(process.join("maps")).unwrap();
        let mapped = maps.lines().filter(|line| line.contains("/memfd:guest-ram")).count();
        [std::fs::read_dir(process.join("fd")).unwrap().count(), mapped]
    }

    pub(crate) fn client(&self) -> Client {
        self.client_of(Shape::default())
    }

    /// A front-end. The server rejects it as long as it takes the one before for connected: a process that another test spawns
    /// holds a copy of that one's socket between fork and exec. So a failure is final only after some attempts.
    pub(crate) fn client_of(&self, shape: Shape) -> Client {
        let path = self.path("socket");
        for _ in 0..20 {
            match Client::connect(&path, shape) {
                Ok(client) => return client,
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
        Client::connect(&path, shape).unwrap_or_else(|error| panic!("{error}; its log:\n{}", self.log()))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it exits by itself.
    pub(crate) fn wait_for_exit(&mut self) -> Output {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let stdout = std::fs::read_to_string(self.path("stdout")).unwrap();
                return Output { status, stdout, log: self.log() };
            }
            assert!(start.elapsed() < LIMIT, "it does not exit; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends SIGTERM, and waits.
    pub(crate) fn stop(&mut self) -> Output {
        self.signal(Signal::TERM);
        self.wait_for_exit()
    }

    /// Runs it until it exits.
    pub(crate) fn run(arguments: &[&str]) -> Output {
        Self::start(arguments).wait_for_exit()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}
