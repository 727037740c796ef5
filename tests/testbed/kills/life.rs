//! One life of the program: a process, and the thread that kills it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::client::Error;

use super::Options;

/// Time-out of everything that the program does by itself. It is long because other tests share the processors.
const LIMIT: Duration = Duration::from_secs(20);
/// Below this, the killer does not sleep, because it would wake up too late.
const SPIN: Duration = Duration::from_micros(200);

pub(super) struct Life {
    child: Child,
    /// When it was executed.
    pub(super) started: Instant,
    killer: Option<JoinHandle<Option<u64>>>,
    killed: Arc<AtomicBool>,
}

impl Life {
    /// Executes the program on the socket `socket` and the disk `disk` in `directory`.
    pub(super) fn start(options: &Options, directory: &Path, seed: u64) -> Result<Self, Error> {
        let path = |name| directory.join(name).display().to_string();
        let latency = options.latency.as_nanos();
        let device = format!("emulated:file={},latency={latency}ns,order=random,seed={seed}", path("disk"));
        let (socket, queues) = (path("socket"), options.shape.queues.to_string());
        let started = Instant::now();
        let child = Command::new(&options.program)
            .args(["--socket-path", &socket, "--device", &device, "--queues", &queues])
            .args(&options.arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.join("log"))?)
            .spawn()?;
        Ok(Self { child, started, killer: None, killed: Arc::default() })
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Kills it at `time`. The process is not waited for before the killer has ended, so the PID stays its own.
    pub(super) fn kill_at(&mut self, time: Instant) {
        let (pid, killed) = (self.pid(), Arc::clone(&self.killed));
        self.killer = Some(std::thread::spawn(move || {
            while let Some(rest) = time.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero()) {
                if rest > SPIN { std::thread::sleep(rest - SPIN) } else { std::hint::spin_loop() }
            }
            let memory = own_memory(pid);
            let done = kill_process(pid, Signal::KILL).is_ok();
            killed.store(done, SeqCst);
            memory
        }));
    }

    /// True if it has been killed.
    pub(super) fn is_over(&self) -> bool {
        self.killed.load(SeqCst)
    }

    /// True if it is going to be killed; returns when it has been.
    pub(super) fn dies(&self) -> bool {
        let start = Instant::now();
        while self.killer.is_some() && !self.is_over() && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.is_over()
    }

    /// Connects as soon as it listens. `None` if it is killed before.
    pub(super) fn connect(&mut self, directory: &Path) -> Result<Option<UnixStream>, Error> {
        let path = directory.join("socket");
        loop {
            // Before the attempt: the socket of a killed program may have accepted it.
            let over = self.is_over();
            match UnixStream::connect(&path) {
                Ok(socket) => return Ok(Some(socket)),
                Err(_) if over => return Ok(None),
                Err(error) if self.started.elapsed() > LIMIT => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
            if self.killer.is_none()
                && let Some(status) = self.child.try_wait()?
            {
                return Err(format!("the program ended by itself: {status}").into());
            }
        }
    }

    /// Waits for its end, or ends it with SIGTERM. Its own memory at the time of the kill, KiB, if it had any then.
    pub(super) fn end(mut self, killed: bool) -> Result<Option<u64>, Error> {
        let memory = match self.killer.take() {
            Some(killer) => killer.join().map_err(|_| "the killer panicked")?,
            None => own_memory(self.pid()),
        };
        if !killed {
            kill_process(self.pid(), Signal::TERM)?;
        }
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            if let Some(status) = self.child.try_wait()? {
                use std::os::unix::process::ExitStatusExt;
                let wanted = if killed { status.signal() == Some(Signal::KILL.as_raw()) } else { status.success() };
                return if wanted { Ok(memory) } else { Err(format!("the program ended by itself: {status}").into()) };
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Err("the program does not end".into())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        if let Some(killer) = self.killer.take() {
            drop(killer.join());
        }
        // Without effect if it has been waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Anonymous memory of a process, KiB. That of the guest and of the disk is not its own.
fn own_memory(pid: Pid) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}
