//! `qmp SOCKET COMMAND [ARGUMENTS]`: sends one command to QEMU and prints the answer; ARGUMENTS is a JSON object.
//!
//! It needs no JSON parser: QEMU sends one object per line, and the first key shows its kind.

use std::io::{BufRead, BufReader, Error, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (socket, command, arguments) = match words.as_slice() {
        [socket, command] => (socket, command, "{}"),
        [socket, command, arguments] => (socket, command, arguments.as_str()),
        _ => {
            eprintln!("usage: qmp SOCKET COMMAND [ARGUMENTS]");
            return ExitCode::from(2);
        }
    };
    match execute(socket, command, arguments) {
        Ok(answer) => {
            println!("{answer}");
            if answer.starts_with("{\"error\"") { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("qmp: {command} over {socket}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn execute(socket: &str, command: &str, arguments: &str) -> Result<String, Error> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    // Skips the greeting and leaves negotiation mode. QEMU's QMP specification §2.2
    writeln!(stream, r#"{{"execute": "qmp_capabilities"}}"#)?;
    answer(&mut lines)?;
    writeln!(stream, r#"{{"execute": "{command}", "arguments": {arguments}}}"#)?;
    answer(&mut lines)
}

/// The next line that is an answer. The greeting and events may come before it.
fn answer(lines: &mut impl Iterator<Item = Result<String, Error>>) -> Result<String, Error> {
    for line in lines {
        let line = line?;
        if line.starts_with("{\"return\"") || line.starts_with("{\"error\"") {
            return Ok(line);
        }
    }
    Err(Error::other("QEMU closed the socket without an answer"))
}
