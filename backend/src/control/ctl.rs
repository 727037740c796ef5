//! `vhost-device-vfio ctl`: the client of the control socket.

use std::io::{self, Write};
use std::path::Path;

use serde_json::Value;

use super::command::Command;
use super::connection::{Connection, CtlError};
use super::top;

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
