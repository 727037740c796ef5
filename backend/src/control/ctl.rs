//! `vhost-device-vfio ctl`: the client of the control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::{Command, VERSION, top};

/// How long the server may take to answer; more than any command that waits for the device.
const ANSWER_TIME: Duration = Duration::from_secs(120);

/// Why there is no answer, or what it says.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// Nobody can be asked.
    #[error("{path:?}: {source}; is a vhost-device-vfio running with --control there, and are you its user or root?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The connection ended.
    #[error("no answer: {0}")]
    Answer(io::Error),
    /// The answer is no JSON object of this version.
    #[error("an answer that this program does not understand: {0}; use the ctl of the running program's version")]
    NotUnderstood(String),
    /// The server refuses.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a running program.
pub(super) struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    pub(super) fn open(path: &Path) -> Result<Self, CtlError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(ANSWER_TIME))?;
            stream.set_write_timeout(Some(ANSWER_TIME)).map(|()| stream)
        };
        let failed = |source| CtlError::Connect { path: path.to_owned(), source };
        Ok(Self { stream: BufReader::new(connect().map_err(failed)?) })
    }

    /// Sends a command, and waits for its result.
    pub(super) fn ask(&mut self, command: &Command) -> Result<Value, CtlError> {
        let Ok(Value::Object(mut request)) = serde_json::to_value(command) else {
            unreachable!("a command is an object");
        };
        request.insert("version".into(), VERSION.into());
        // A server that sends this client away has closed the connection already; its answer says why.
        let _ = writeln!(self.stream.get_mut(), "{}", Value::Object(request));
        let mut line = String::new();
        if self.stream.read_line(&mut line).map_err(CtlError::Answer)? == 0 {
            return Err(CtlError::Answer(io::ErrorKind::UnexpectedEof.into()));
        }
        let not_understood = || CtlError::NotUnderstood(line.trim_end().escape_debug().take(200).collect());
        let mut answer: Map<String, Value> = serde_json::from_str(&line).map_err(|_| not_understood())?;
        if answer.get("version") != Some(&VERSION.into()) {
            return Err(not_understood());
        }
        match (answer.remove("result"), answer.remove("error")) {
            (Some(result), None) => Ok(result),
            (None, Some(Value::String(error))) => Err(CtlError::Refused(error)),
            _ => Err(not_understood()),
        }
    }
}

/// Executes a command at the socket, and prints its result; without a command, shows a live view until the program ends.
///
/// # Errors
/// See [`CtlError`].
pub fn run(socket: &Path, command: Option<&Command>, json: bool) -> Result<(), CtlError> {
    let mut connection = Connection::open(socket)?;
    let Some(command) = command else { return top::show(&mut connection) };
    let result = connection.ask(command)?;
    let text = if json { format!("{result}\n") } else { as_text(&result) };
    io::stdout().write_all(text.as_bytes()).map_err(CtlError::Answer)
}

/// One line for each value, with the names on the way to it.
fn as_text(value: &Value) -> String {
    let mut lines = Vec::new();
    flatten("", value, &mut lines);
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    lines.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| flatten(&below(key), value, lines)),
        Value::Array(items) if items.is_empty() => lines.push((name.to_owned(), "none".into())),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, value)| flatten(&below(&n.to_string()), value, lines));
        }
        Value::String(text) => lines.push((name.to_owned(), text.escape_debug().to_string())),
        Value::Null => lines.push((name.to_owned(), "none".into())),
        other => lines.push((name.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_is_a_line_for_each_value_and_no_control_characters() {
        let result =
            json!({ "front_end": { "name": "a\u{1b}[2Jb", "pid": 7 }, "regions": [{ "gpa": 0 }], "none": null });
        let text = as_text(&result);
        assert_eq!(text, "front_end.name  a\\u{1b}[2Jb\nfront_end.pid   7\nnone            none\nregions.0.gpa   0\n");
    }
}
