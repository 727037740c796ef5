//! A connection of `ctl` to a running program.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};

use super::command::{Command, VERSION};

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
