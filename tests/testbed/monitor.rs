//! A QMP monitor without a QEMU. It greets, answers each command as the test says, and records the commands.

use std::io::{BufRead, BufReader, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

/// The first line of QEMU 11.1.3.
pub const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": ["oob"]}}"#;

/// The objects of a virtual machine that a monitor lists, by path: name and type of each property.
pub type Objects = Vec<(&'static str, Vec<(&'static str, &'static str)>)>;

/// See the top of this file.
pub struct FakeMonitor {
    path: PathBuf,
    commands: Receiver<String>,
    _directory: TempDir,
    _thread: JoinHandle<Result<()>>,
}

impl FakeMonitor {
    /// A monitor of a virtual machine with these `objects`, which accepts every `device_del`.
    #[must_use]
    pub fn of(objects: Objects) -> Self {
        Self::answering(move |command, arguments| {
            let listed = |properties: &[(&str, &str)]| {
                properties.iter().map(|(name, kind)| json!({ "name": name, "type": kind })).collect::<Value>()
            };
            let object = objects.iter().find(|(path, _)| arguments["path"] == *path);
            match (command, object) {
                ("qom-list", Some((_, properties))) => json!({ "return": listed(properties) }),
                ("qom-list", None) => json!({ "error": { "class": "DeviceNotFound", "desc": "no such object" } }),
                _ => json!({ "return": {} }),
            }
        })
    }

    /// A monitor with these answers to command and arguments. Before each answer it sends an event.
    pub fn answering(answer: impl Fn(&str, &Value) -> Value + Send + 'static) -> Self {
        Self::serving(move |stream, record| {
            let mut socket = stream.try_clone()?;
            writeln!(socket, "{GREETING}\r")?;
            for line in BufReader::new(stream).lines() {
                let mut command: Value = serde_json::from_str(&line?)?;
                let name = command["execute"].as_str().unwrap_or_default();
                record(format!("{name} {}", command["arguments"]));
                let mut answer = answer(name, &command["arguments"]);
                answer["id"] = command["id"].take();
                writeln!(socket, r#"{{"timestamp": {{"seconds": 1}}, "event": "RTC_CHANGE", "data": {{}}}}"#)?;
                writeln!(socket, "{answer}\r")?;
            }
            Ok(())
        })
    }

    /// A monitor that does this with its only client. What `record` is given is a command.
    ///
    /// # Panics
    /// If it cannot listen.
    pub fn serving(serve: impl FnOnce(UnixStream, &dyn Fn(String)) -> Result<()> + Send + 'static) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        let path = directory.as_path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a new path");
        let (sender, commands) = channel();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            serve(stream, &|command| _ = sender.send(command))
        });
        Self { path, commands, _directory: directory, _thread: thread }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The commands since the last call, each with its arguments.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.commands.try_iter().collect()
    }

    /// The next command, with its arguments.
    ///
    /// # Panics
    /// If none comes in `limit`.
    #[must_use]
    pub fn next_command(&self, limit: Duration) -> String {
        self.commands.recv_timeout(limit).expect("a command")
    }
}
