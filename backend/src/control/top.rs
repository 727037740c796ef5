//! `ctl top`: what the device does now, on a terminal of 80 columns and 24 lines.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::command::Command;
use super::connection::{Connection, CtlError};

const INTERVAL: Duration = Duration::from_secs(1);
const COLUMNS: usize = 80;
const LINES: usize = 24;
/// Cursor to the top left, and erase to the end (ECMA-48 CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[J";

/// What is known of one moment.
struct Sample {
    at: Instant,
    status: Value,
    memory: Value,
    /// `None` for a whole function.
    stats: Option<Value>,
}

impl Sample {
    fn take(connection: &mut Connection) -> Result<Self, CtlError> {
        let status = connection.ask(&Command::Status {})?;
        let memory = connection.ask(&Command::Memory {})?;
        let stats = match connection.ask(&Command::Stats {}) {
            Ok(stats) => Some(stats),
            Err(CtlError::Refused(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { at: Instant::now(), status, memory, stats })
    }
}

/// Shows the view, again each second. If standard output is no terminal, shows it once.
///
/// # Errors
/// The program has ended, or does not answer.
pub(super) fn show(connection: &mut Connection) -> Result<(), CtlError> {
    let terminal = io::stdout().is_terminal();
    let mut before = Sample::take(connection)?;
    loop {
        std::thread::sleep(INTERVAL);
        let now = Sample::take(connection)?;
        let clear = if terminal { CLEAR } else { "" };
        let mut out = io::stdout().lock();
        write!(out, "{clear}{}", frame(&before, &now)).and_then(|()| out.flush()).map_err(CtlError::Answer)?;
        if !terminal {
            return Ok(());
        }
        before = now;
    }
}

/// One picture, of at most [`LINES`] lines, the last of which the cursor is on.
fn frame(before: &Sample, now: &Sample) -> String {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-3);
    let mut lines = head(now);
    if let (Some(earlier), Some(later)) = (&before.stats, &now.stats) {
        let rate = |pointer: &str| number(later, pointer).saturating_sub(number(earlier, pointer)) as f64 / seconds;
        lines.extend(operations(&rate, later));
        lines.extend(rings(&rate, later));
    }
    let shown = LINES - 1;
    if lines.len() > shown {
        let more = lines.len() - shown + 1;
        lines.truncate(shown - 1);
        lines.push(format!("… and {more} more lines; stats shows all"));
    }
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{}", line.chars().take(COLUMNS).collect::<String>());
        text
    })
}

fn head(sample: &Sample) -> Vec<String> {
    let Sample { status, memory, .. } = sample;
    let front_end = text(status, "/front_end/name");
    let drained = if status["drained"] == true { "  DRAINED" } else { "" };
    let state = text(status, "/device_state");
    let uptime = number(status, "/uptime_s");
    vec![
        format!(
            "{} {}   pid {}   up {}:{:02}:{:02}",
            text(status, "/device"),
            text(status, "/personality"),
            number(status, "/pid"),
            uptime / 3600,
            uptime / 60 % 60,
            uptime % 60
        ),
        format!("device {state}{drained}   DMA {}   log {}", text(status, "/verdict"), text(status, "/log_level")),
        format!("front-end {front_end}"),
        format!(
            "mapped {} MiB in {} regions, {} front-ends served",
            number(memory, "/mapped_bytes") >> 20,
            memory["regions"].as_array().map_or(0, Vec::len),
            number(status, "/front_ends_served")
        ),
        String::new(),
    ]
}

/// Requests by operation: rate, throughput and times.
fn operations(rate: &dyn Fn(&str) -> f64, stats: &Value) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<13}{:>12}{:>12}{:>11}{:>10}{:>10}{:>10}",
        "", "IOPS", "MiB/s", "mean µs", "p50", "p99", "p99.9"
    )];
    let names = [("read", "reads", "bytes_read"), ("write", "writes", "bytes_written"), ("flush", "flushes", "")];
    for (operation, requests, bytes) in
        names.into_iter().chain([("discard", "discards", ""), ("write_zeroes", "write_zeroes", "")])
    {
        let throughput = if bytes.is_empty() {
            "-".to_owned()
        } else {
            format!("{:.1}", rate(&format!("/counters/{bytes}")) / f64::from(1 << 20))
        };
        let mut line = format!("{operation:<13}{:>12.0}{throughput:>12}", rate(&format!("/counters/{requests}")));
        let timed = stats["latency"].as_array().and_then(|all| all.iter().find(|one| one["operation"] == operation));
        for (name, width) in [("mean_us", 11), ("p50_us", 10), ("p99_us", 10), ("p999_us", 10)] {
            let value = timed.and_then(|timed| timed[name].as_f64());
            let _ = write!(line, "{:>width$}", value.map_or("-".to_owned(), |value| format!("{value:.1}")));
        }
        lines.push(line);
    }
    if stats["latency_measured"] != true {
        lines.push("times are not measured; ctl latency true measures them".into());
    }
    lines.push(format!(
        "errors {}   resets {}   aborts {}   kicks/s {:.0}   calls/s {:.0}",
        number(stats, "/counters/errors"),
        number(stats, "/counters/recoveries"),
        number(stats, "/counters/aborts"),
        rate("/counters/kicks"),
        rate("/counters/calls")
    ));
    lines.push(String::new());
    lines
}

/// The virtqueues, three to a line.
fn rings(rate: &dyn Fn(&str) -> f64, stats: &Value) -> Vec<String> {
    let mut cells = Vec::new();
    for (worker, report) in stats["workers"].as_array().into_iter().flatten().enumerate() {
        for (slot, ring) in report["virtqueues"].as_array().into_iter().flatten().enumerate() {
            let iops = rate(&format!("/workers/{worker}/virtqueues/{slot}/completed"));
            let (queue, in_flight) = (number(ring, "/virtqueue"), number(ring, "/in_flight"));
            cells.push((queue, format!("{:<26}", format!("q{queue:<3}{iops:>9.0}/s {in_flight:>5} deep"))));
        }
    }
    cells.sort_by_key(|(queue, _)| *queue);
    cells
        .chunks(3)
        .map(|row| row.iter().map(|(_, cell)| cell.as_str()).collect::<String>().trim_end().to_owned())
        .collect()
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

/// A text, without control characters.
fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).map_or("-".into(), |text| text.escape_debug().to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(at: Instant, reads: u64, queues: u64) -> Sample {
        let rings: Vec<_> =
            (0..queues).map(|n| json!({ "virtqueue": n, "completed": reads * 1000, "in_flight": 65_535 })).collect();
        let status = json!({
            "device": "0000:00:04.0", "personality": "vhost-user-blk", "pid": 4_194_304, "uptime_s": 1_000_000,
            "device_state": "up", "drained": true, "verdict": "coherent", "log_level": "info",
            "front_end": { "name": format!("{}\u{1b}[31m", "long name ".repeat(20)) }, "front_ends_served": 1_000_000,
        });
        let counters = json!({ "reads": reads, "bytes_read": reads << 20, "errors": 3, "recoveries": 1 });
        let latency =
            json!([{ "operation": "read", "mean_us": 81.25, "p50_us": 80.0, "p99_us": 1_000_000.0, "p999_us": 2e6 }]);
        let stats = json!({
            "counters": counters, "latency_measured": true, "latency": latency, "workers": [{ "virtqueues": rings }],
        });
        Sample { at, status, memory: json!({ "mapped_bytes": 1_u64 << 40, "regions": [{}] }), stats: Some(stats) }
    }

    #[test]
    fn the_view_fits_80_columns_and_24_lines_with_64_queues() {
        let start = Instant::now();

        let frame = frame(&sample(start, 0, 64), &sample(start + Duration::from_secs(2), 2_000_000, 64));

        assert!(frame.lines().count() < LINES, "{frame}");
        assert!(frame.lines().all(|line| line.chars().count() <= COLUMNS), "{frame}");
        assert!(!frame.contains('\u{1b}'), "{frame}");
        assert!(frame.contains("more lines; stats shows all"), "{frame}");
    }

    #[test]
    fn rates_are_per_second_and_depths_are_as_they_are() {
        let start = Instant::now();

        let frame = frame(&sample(start, 1000, 2), &sample(start + Duration::from_secs(2), 3000, 2));

        let read = frame.lines().find(|line| line.starts_with("read")).unwrap();
        let columns: Vec<_> = read.split_whitespace().collect();
        assert_eq!(columns, ["read", "1000", "1000.0", "81.2", "80.0", "1000000.0", "2000000.0"]);
        assert!(frame.contains("q1    1000000/s 65535 deep"), "{frame}");
        assert!(frame.contains("device up  DRAINED   DMA coherent"), "{frame}");
        assert!(frame.contains("errors 3   resets 1"), "{frame}");
    }
}
