//! Lines of JSON: requests in, replies out.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::command::{Command, VERSION};
use super::subject::Subject;
use crate::local_server::{Dialogue, Job, Step};

/// The server's side of the control socket.
pub struct Lines(Arc<Subject>);

impl Lines {
    /// About this subject.
    #[must_use]
    pub fn new(subject: Arc<Subject>) -> Self {
        Self(subject)
    }
}

/// A request, with what comes back.
struct Request {
    id: Option<Value>,
    command: Command,
}

impl Dialogue for Lines {
    const MOST_BYTES: usize = 4096;

    fn step(&mut self, input: &mut Vec<u8>) -> Step {
        let Some(end) = input.iter().position(|&byte| byte == b'\n') else { return Step::Incomplete };
        let line: Vec<u8> = input.drain(..=end).collect();
        match parse(&line) {
            Ok(Request { id, command }) => self.handle(id, command),
            Err((id, error)) => Step::Reply(reply(id, Err(error))),
        }
    }

    fn too_long(&self) -> Vec<u8> {
        reply(None, Err(format!("a request has at most {} bytes, and ends with a newline", Self::MOST_BYTES)))
    }

    fn busy(&self) -> Vec<u8> {
        reply(None, Err("another command that takes its time is running; try again when it is done".into()))
    }

    fn refused(&self, reason: &str) -> Vec<u8> {
        reply(None, Err(reason.to_owned()))
    }
}

fn parse(line: &[u8]) -> Result<Request, (Option<Value>, String)> {
    let example = r#"a request is a JSON object such as {"version":1,"command":"status"}"#;
    let mut fields: Map<String, Value> =
        serde_json::from_slice(line).map_err(|error| (None, format!("{error}; {example}")))?;
    let id = fields.remove("id");
    match fields.remove("version") {
        Some(version) if version == VERSION => {}
        Some(other) => return Err((id, format!("version {other}; this program speaks version {VERSION}"))),
        None => return Err((id, format!("no version; {example}"))),
    }
    match serde_json::from_value(Value::Object(fields)) {
        Ok(command) => Ok(Request { id, command }),
        Err(error) => Err((id, error.to_string())),
    }
}

fn reply(id: Option<Value>, result: Result<Value, String>) -> Vec<u8> {
    let mut fields = Map::new();
    fields.insert("version".into(), VERSION.into());
    if let Some(id) = id {
        fields.insert("id".into(), id);
    }
    match result {
        Ok(result) => fields.insert("result".into(), result),
        Err(error) => fields.insert("error".into(), error.into()),
    };
    let mut line = Value::Object(fields).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn value(answer: impl Serialize) -> Value {
    serde_json::to_value(answer).expect("texts, numbers and booleans")
}

impl Lines {
    fn handle(&self, id: Option<Value>, command: Command) -> Step {
        let subject = &self.0;
        let result = match command {
            Command::Status {} => Ok(value(subject.status())),
            Command::Stats {} => subject.stats().map(value),
            Command::Verdict {} => Ok(value(subject.verdict())),
            Command::Memory {} => Ok(value(subject.memory())),
            Command::LogLevel { level } => {
                subject.set_log_level(level);
                Ok(json!({ "log_level": level.to_string().to_lowercase() }))
            }
            Command::Latency { on } => subject.measure(on).map(|()| json!({ "latency_measured": on })),
            Command::Resume {} => subject.resume().map(|()| json!({ "drained": false })),
            Command::Takeover {} => subject.start_successor().map(|()| json!({ "started": true })),
            Command::Successor { kvm_socket, off } => {
                let permitted = subject.permit_successor((!off).then_some(kvm_socket));
                permitted.map(|()| json!({ "successor": if off { "nobody" } else { "the next front-end" } }))
            }
            Command::Drain { .. } | Command::ResetDevice {} | Command::Identify {} | Command::Smart {} => {
                return Step::Later(job(Arc::clone(subject), id, command));
            }
        };
        Step::Reply(reply(id, result))
    }
}

/// The commands that wait for the device.
fn job(subject: Arc<Subject>, id: Option<Value>, command: Command) -> Job {
    Box::new(move || {
        let result = match command {
            Command::Drain { timeout_ms } => {
                let limit = Duration::from_millis(timeout_ms.into());
                subject.drain(limit).map(|()| json!({ "drained": true }))
            }
            Command::ResetDevice {} => subject.reset_device().map(|()| json!({ "reset": true })),
            Command::Identify {} => subject.identify().map(value),
            Command::Smart {} => subject.smart().map(value),
            _ => Err("not a command that takes its time".into()),
        };
        reply(id, result)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(line: &str) -> (Option<Value>, String) {
        parse(line.as_bytes()).err().expect("refused")
    }

    #[test]
    fn a_request_names_its_version_and_a_command() {
        let Request { id, command } = parse(br#"{"version":1,"id":"a","command":"drain"}"#).ok().unwrap();
        assert_eq!((id, command), (Some("a".into()), Command::Drain { timeout_ms: 5000 }));
        let Request { command, .. } = parse(br#"{"version":1,"command":"log-level","level":"debug"}"#).ok().unwrap();
        assert_eq!(command, Command::LogLevel { level: log::LevelFilter::Debug });
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_reason() {
        assert!(error("").1.contains("a request is a JSON object such as"));
        assert!(error("[1]").1.contains("a request is a JSON object such as"));
        assert!(error(r#"{"command":"status"}"#).1.contains("no version"));
        assert_eq!(error(r#"{"version":2,"id":5,"command":"status"}"#).0, Some(5.into()), "the id comes back");
        assert!(error(r#"{"version":2,"command":"status"}"#).1.contains("this program speaks version 1"));
        assert!(error(r#"{"version":1,"command":"format"}"#).1.contains("unknown variant `format`"));
        assert!(error(r#"{"version":1,"command":"status","x":1}"#).1.contains("unknown field `x`"));
        assert!(error(r#"{"version":1,"command":"log-level","level":"loud"}"#).1.contains("loud"));
        let deep = error(&format!("{{\"id\":{}", "[".repeat(4000)));
        assert!(deep.1.contains("recursion limit"), "{}", deep.1);
    }

    #[test]
    fn a_reply_is_one_line() {
        let line = reply(Some("a\nb".into()), Err("two\nlines".into()));
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        assert_eq!(line, b"{\"error\":\"two\\nlines\",\"id\":\"a\\nb\",\"version\":1}\n");
    }
}
