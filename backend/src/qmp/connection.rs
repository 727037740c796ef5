//! One connection to a monitor: JSON objects, one in each line (QEMU: `docs/interop/qmp-spec.rst`). What is read is bounded in
//! bytes, and all of it in time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

use super::QmpError;

/// Longest line. The longest answer lists the properties of a device: about 200 of less than 100 bytes.
pub(super) const MAX_LINE: usize = 256 << 10;
/// Most bytes in one connection: some hundred answers, and the events between them.
pub(super) const MAX_TOTAL: usize = 4 << 20;
/// Most characters of the monitor's text in an error.
const MAX_SHOWN: usize = 200;

/// See the top of this file.
pub(super) struct Connection {
    socket: UnixStream,
    deadline: Instant,
    /// What has been received of the next lines.
    received: Vec<u8>,
    total: usize,
    /// Number of commands sent; each has its own as `id`.
    commands: u64,
}

impl Connection {
    /// Connects to the monitor at `path`. No call on the connection lasts longer than `deadline`.
    pub(super) fn open(path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let unreachable = |errno| match errno {
            Errno::AGAIN => QmpError::TimedOut("connection"),
            errno => QmpError::Unreachable(path.into(), errno),
        };
        let address = SocketAddrUnix::new(path).map_err(|errno| QmpError::Path(path.into(), errno))?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(|errno| QmpError::System("create a socket", errno.into()))?;
        let left = left(deadline).ok_or(QmpError::TimedOut("connection"))?;
        // This also limits connect, which waits while the backlog is full (unix_stream_connect).
        set_socket_timeout(&socket, Timeout::Send, Some(left)).map_err(unreachable)?;
        connect(&socket, &address).map_err(unreachable)?;
        Ok(Self { socket: socket.into(), deadline, received: Vec::new(), total: 0, commands: 0 })
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Receives the greeting, and leaves the negotiation mode (QMP specification, "Capabilities Negotiation").
    pub(super) fn negotiate(&mut self) -> Result<(), QmpError> {
        let greeting = self.line("greeting")?;
        if !greeting["QMP"].is_object() {
            return Err(QmpError::Garbage("greeting", shown(&greeting.to_string())));
        }
        self.execute("qmp_capabilities", &json!({})).map(drop)
    }

    /// Sends a command, and returns what it has returned.
    pub(super) fn execute(&mut self, command: &'static str, arguments: &Value) -> Result<Value, QmpError> {
        self.commands += 1;
        let id = json!(self.commands);
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": &id }));
        let left = left(self.deadline).ok_or(QmpError::TimedOut(command))?;
        let sent = self.socket.set_write_timeout(Some(left)).and_then(|()| self.socket.write_all(line.as_bytes()));
        sent.map_err(|error| failed("write to the socket", command, error))?;
        loop {
            // Without the `id` it is an event, or the answer to what somebody else has sent.
            let mut answer = self.line(command)?;
            if answer["id"] != id {
                continue;
            }
            return match answer.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(QmpError::Refused(command, shown(answer["error"]["desc"].as_str().unwrap_or("no reason")))),
            };
        }
    }

    /// Receives the next line, an object.
    fn line(&mut self, awaited: &'static str) -> Result<Value, QmpError> {
        let mut searched = 0;
        let end = loop {
            if let Some(at) = self.received[searched..].iter().position(|byte| *byte == b'\n') {
                break searched + at + 1;
            }
            searched = self.received.len();
            self.receive(awaited)?;
        };
        let line: Vec<u8> = self.received.drain(..end).collect();
        match serde_json::from_slice::<Value>(&line) {
            Ok(value) if value.is_object() => Ok(value),
            _ => Err(QmpError::Garbage(awaited, shown(String::from_utf8_lossy(&line).trim_end()))),
        }
    }

    /// Appends what the monitor has sent, at least a byte.
    fn receive(&mut self, awaited: &'static str) -> Result<(), QmpError> {
        if self.received.len() > MAX_LINE {
            return Err(QmpError::TooMuch(MAX_LINE, "in a line"));
        }
        if self.total > MAX_TOTAL {
            return Err(QmpError::TooMuch(MAX_TOTAL, "in all"));
        }
        let left = left(self.deadline).ok_or(QmpError::TimedOut(awaited))?;
        let mut bytes = [0; 4096];
        let count = self.socket.set_read_timeout(Some(left)).and_then(|()| self.socket.read(&mut bytes));
        match count {
            Ok(0) => Err(QmpError::Closed(awaited)),
            Ok(count) => {
                self.received.extend_from_slice(&bytes[..count]);
                self.total += count;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(failed("read from the socket", awaited, error)),
        }
    }
}

/// The time that is left; `None` if there is none.
fn left(deadline: Instant) -> Option<Duration> {
    Some(deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

fn failed(call: &'static str, awaited: &'static str, error: io::Error) -> QmpError {
    match error.kind() {
        io::ErrorKind::WouldBlock => QmpError::TimedOut(awaited),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => QmpError::Closed(awaited),
        _ => QmpError::System(call, error),
    }
}

/// The start of the monitor's `text`, without control characters.
pub(super) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN).collect::<String>().escape_debug().to_string();
    if text.chars().nth(MAX_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}
