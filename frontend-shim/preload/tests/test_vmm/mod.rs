//! Starts the minimal VMM (examples/toy_vmm.rs) and sends it commands.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use shim::{Client, Status};

use crate::library;

/// A running VMM.
pub(crate) struct TestVmm {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    socket: PathBuf,
}

impl TestVmm {
    /// Starts it with the library preloaded, and with `variables` in its environment.
    pub(crate) fn start(variables: &[(&str, &str)]) -> Self {
        Self::spawn(|command, socket| {
            command
                .env("LD_PRELOAD", library::path())
                .env("KVM_VFIO_SHIM_SOCKET", socket)
                .envs(variables.iter().copied());
        })
    }

    /// Starts it without the library.
    pub(crate) fn bare() -> Self {
        Self::spawn(|_, _| ())
    }

    fn spawn(prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("shim-vmm-{}-{}.sock", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let socket = std::env::temp_dir().join(name);
        let mut command = Command::new(library::target().join("examples/toy_vmm"));
        prepare(&mut command, &socket);
        let (stdin, stdout, stderr) = (Stdio::piped(), Stdio::piped(), Stdio::piped());
        let mut process = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
        let (input, output) = (process.stdin.take(), BufReader::new(process.stdout.take().unwrap()));
        Self { process, input, output, socket }
    }

    /// Executes one command and returns its result.
    pub(crate) fn run(&mut self, command: &str) -> String {
        writeln!(self.input.as_mut().expect("not ended"), "{command}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        assert!(answer.ends_with('\n'), "the VMM died at: {command}");
        answer.trim_end().to_owned()
    }

    /// Connects a client to its socket.
    pub(crate) fn client(&self) -> (Client, Status) {
        Client::connect(&self.socket, Client::DEFAULT_TIMEOUT).unwrap()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The path at which its shim listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends it and returns its log.
    pub(crate) fn end(&mut self) -> String {
        drop(self.input.take());
        assert!(self.process.wait().unwrap().success());
        let mut log = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for TestVmm {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
        _ = std::fs::remove_file(&self.socket);
    }
}
