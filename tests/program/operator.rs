//! An operator sees what the program does and changes its mind, while a front-end is served.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::{Value, json};

use crate::process::{Output, PROGRAM, Process};

const CONTROL: [&str; 2] = ["--control", "DIR/control"];

#[test]
fn a_disk_that_is_not_the_expected_one_is_refused_by_its_identity() {
    let mut process =
        Process::serve_with("size=1M,serial=RIGHT", &["--control", "DIR/control", "--expect-disk", "RIGHT"]);
    let identity = ctl(&process, &["identify"]).unwrap();
    let identifier = identity["eui64"].as_str().filter(|id| !id.is_empty()).unwrap_or("RIGHT").to_owned();
    assert!(process.stop().status.success());

    let device = ["--socket-path", "DIR/socket", "--device", "emulated:size=1M,serial=WRONG"];
    let refused = Process::run(&[&device[..], &["--expect-disk", "RIGHT"]].concat());
    let mut again = Process::serve_with("size=1M,serial=RIGHT", &["--expect-disk", &identifier]);

    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.log.contains("--expect-disk RIGHT, found another disk: serial WRONG"), "{}", refused.log);
    assert!(again.stop().status.success());
}

/// Runs `ctl` and returns its result, or its error.
pub(crate) fn ctl(process: &Process, words: &[&str]) -> Result<Value, String> {
    let socket = process.path("control").display().to_string();
    let Output { status, stdout, log } = Process::run(&[&["ctl", "--json", "--socket", &socket], words].concat());
    if status.success() { Ok(serde_json::from_str(&stdout).unwrap()) } else { Err(log) }
}

#[test]
fn status_and_stats_tell_what_a_front_end_does() {
    let process = Process::serve_with("size=1M", &CONTROL);
    assert_eq!(std::fs::metadata(process.path("control")).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(ctl(&process, &["status"]).unwrap()["front_end"], Value::Null);
    let mut client = process.client();
    client.write(7, &[0x5a; 1024]).unwrap();
    client.read(7, &mut [0; 512]).unwrap();

    let status = ctl(&process, &["status"]).unwrap();
    assert_eq!((&status["personality"], &status["device_state"]), (&json!("vhost-user-blk"), &json!("up")));
    assert_eq!(status["front_end"]["pid"], std::process::id());
    assert_eq!((&status["drained"], &status["verdict"]), (&json!(false), &json!("coherent")));
    let memory = ctl(&process, &["memory"]).unwrap();
    assert!(memory["regions"][0]["bytes"].as_u64() <= memory["mapped_bytes"].as_u64(), "{memory}");
    assert!(memory["regions"][0]["bytes"].as_u64() > Some(0), "{memory}");

    // A worker publishes with each batch; counters that are shown may be a tenth of a second old.
    let mut process = process;
    process.wait_until("the counters are shown", |process| {
        let stats = ctl(process, &["stats"]).unwrap();
        let queues =
            || stats["workers"].as_array().unwrap().iter().flat_map(|worker| worker["virtqueues"].as_array().unwrap());
        let completed: u64 = queues().map(|queue| queue["completed"].as_u64().unwrap()).sum();
        let counted = (&stats["counters"]["reads"], &stats["counters"]["bytes_written"], completed);
        assert_eq!((stats["latency_measured"].clone(), queues().count()), (json!(false), 2));
        counted.0 == 1 && counted.1 == 1024 && completed >= 2 && queues().all(|queue| queue["in_flight"] == 0)
    });
    drop(client);
    process.wait_until("the front-end has left", |process| ctl(process, &["status"]).unwrap()["front_end"].is_null());
    assert_eq!(ctl(&process, &["memory"]).unwrap()["regions"], json!([]));
}

#[test]
fn requests_are_timed_when_that_is_wanted() {
    let mut process = Process::serve_with("size=1M,latency=2ms", &CONTROL);
    let mut client = process.client();
    client.read(0, &mut [0; 512]).unwrap();
    assert_eq!(ctl(&process, &["latency", "true"]).unwrap(), json!({ "latency_measured": true }));
    // The first of them may have been taken before the worker knew.
    (0..3).for_each(|_| drop(client.read(0, &mut [0; 512])));

    process.wait_until("they are shown", |process| {
        let stats = ctl(process, &["stats"]).unwrap();
        let latency = &stats["latency"][0];
        assert_eq!(stats["counters"]["errors"], 0);
        latency["operation"] == "read"
            && latency["count"].as_u64() >= Some(2)
            && latency["p50_us"].as_f64() >= Some(2000.0)
    });
}

#[test]
fn a_drained_device_has_nothing_in_flight_and_resumes_where_it_was() {
    let process = Process::serve_with("size=1M", &CONTROL);
    let mut client = process.client();
    assert_eq!(ctl(&process, &["drain"]).unwrap(), json!({ "drained": true }));
    assert!(ctl(&process, &["drain"]).unwrap_err().contains("drained already; resume"));

    let waiting = std::thread::spawn(move || client.write(3, &[1; 512]).map(|()| client));
    let status = ctl(&process, &["status"]).unwrap();
    assert_eq!((&status["drained"], waiting.is_finished()), (&json!(true), false));
    assert_eq!(ctl(&process, &["stats"]).unwrap()["counters"]["writes"], 0);
    assert_eq!(ctl(&process, &["resume"]).unwrap(), json!({ "drained": false }));

    let mut client = waiting.join().unwrap().unwrap();
    let mut found = [0; 512];
    client.read(3, &mut found).unwrap();
    assert_eq!(found, [1; 512]);
    assert!(ctl(&process, &["resume"]).unwrap_err().contains("it is not drained"));
}

#[test]
fn the_device_is_reset_identified_and_asked_for_its_health_under_a_front_end() {
    let process = Process::serve_with("size=1M,serial=OPERATOR", &CONTROL);
    let mut client = process.client();
    client.write(3, &[1; 512]).unwrap();

    assert_eq!(ctl(&process, &["reset-device"]).unwrap(), json!({ "reset": true }));
    let mut found = [0; 512];
    client.read(3, &mut found).unwrap();
    assert_eq!(found, [1; 512]);
    assert_eq!(ctl(&process, &["stats"]).unwrap()["counters"]["recoveries"], 1);
    let identify = ctl(&process, &["identify"]).unwrap();
    assert_eq!((&identify["serial"], &identify["blocks"]), (&json!("OPERATOR"), &json!(2048)));
    let smart = ctl(&process, &["smart"]).unwrap();
    assert_eq!((&smart["temperature_kelvin"], &smart["host_writes"]), (&json!(300), &json!(1)));
}

#[test]
fn a_whole_function_tells_what_it_can_and_refuses_what_is_the_guests() {
    let process = Process::serve_with("size=1M", &["--vfio-user", CONTROL[0], CONTROL[1]]);
    let status = ctl(&process, &["status"]).unwrap();
    assert_eq!((&status["personality"], &status["device_state"]), (&json!("vfio-user"), &Value::Null));
    assert_eq!(ctl(&process, &["verdict"]).unwrap()["serves"], true);
    assert_eq!(ctl(&process, &["memory"]).unwrap()["released"], false);
    for command in ["stats", "drain", "resume", "reset-device", "identify", "smart"] {
        let error = ctl(&process, &[command]).unwrap_err();
        assert!(error.contains("the guest drives a whole function itself"), "{command}: {error}");
    }
    assert!(ctl(&process, &["takeover"]).unwrap_err().contains("a whole function is not handed over"));
}

#[test]
fn the_log_level_changes_at_run_time() {
    let mut process = Process::serve_with("size=1M", &CONTROL);
    ctl(&process, &["log-level", "debug"]).unwrap();
    drop(process.client());
    process.wait_until("it is detailed", |process| process.log().contains("DEBUG"));
    ctl(&process, &["log-level", "off"]).unwrap();
    let before = process.log();
    drop(process.client());
    assert_eq!(ctl(&process, &["status"]).unwrap()["log_level"], "off");
    let after = process.stop().log;
    assert!(!after[before.len()..].contains("front-end connected"), "{after}");
}

#[test]
fn a_successor_that_the_operator_starts_has_the_control_socket() {
    let mut process = Process::serve_with("size=1M,file=DIR/disk,create=on", &CONTROL);
    let mut client = process.client();
    client.write(3, &[1; 512]).unwrap();
    let before = ctl(&process, &["status"]).unwrap()["pid"].as_u64().unwrap();

    assert_eq!(ctl(&process, &["takeover"]).unwrap(), json!({ "started": true }));
    let output = process.wait_for_exit();

    assert!(output.status.success(), "{}", output.log);
    let mut found = [0; 512];
    client.read(3, &mut found).unwrap();
    assert_eq!(found, [1; 512]);
    let pid = ctl(&process, &["status"]).unwrap()["pid"].as_u64().unwrap();
    assert_ne!(pid, before);
    let successor = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(successor, rustix::process::Signal::TERM).unwrap();
    while process.path("control").exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[test]
fn malformed_oversized_and_many_clients_lose_nothing() {
    let process = Process::serve_with("size=1M", &CONTROL);
    let mut client = process.client();
    let usage = process.usage();
    let connect = || UnixStream::connect(process.path("control")).unwrap();

    for garbage in
        [&b"\xff\xfe\n"[..], b"{}\n", b"[[[[\n", b"{\"version\":1,\"command\":\"format\"}\n", &[b'x'; 10_000]]
    {
        let mut bad = BufReader::new(connect());
        let _ = bad.get_mut().write_all(garbage);
        let mut line = String::new();
        let answered = bad.read_line(&mut line);
        assert!(answered.is_err() || line.contains("\"error\""), "{line}");
    }
    for _ in 0..300 {
        let mut silent = connect();
        let _ = silent.write_all(b"{\"version\"");
    }
    let lazy: Vec<_> = (0..40).map(|_| connect()).collect();
    client.write(3, &[1; 512]).unwrap();
    drop(lazy);

    let mut process = process;
    process.wait_until("everybody is gone", |process| ctl(process, &["status"]).is_ok() && process.usage() == usage);
    assert!(process.log().lines().count() < 60, "{}", process.log());
    let nobody = Process::run(&["ctl", "--socket", "DIR/none", "status"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(nobody.log.contains("running with --control there"), "{}", nobody.log);
}

#[test]
fn top_fits_a_terminal() {
    let process = Process::serve_with("size=1M", &CONTROL);
    let socket = process.path("control").display().to_string();

    let output = Process::run(&["ctl", "--socket", &socket, "top"]);

    assert!(output.status.success(), "{}", output.log);
    assert!(output.stdout.lines().count() <= 23 && output.stdout.lines().all(|line| line.chars().count() <= 80));
    assert!(output.stdout.contains("device up   DMA coherent"), "{}", output.stdout);
}

/// The head and the body of an answer.
fn get(stream: &mut (impl Read + Write), accept: &str) -> (String, String) {
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5";

#[test]
fn metrics_are_what_prometheus_reads() {
    let process = Process::serve_with("size=1M", &["--metrics", "DIR/metrics", "--latency"]);
    let mut client = process.client();
    client.write(3, &[1; 512]).unwrap();
    let mut process = process;
    process.wait_until("the write is counted", |process| {
        let (_, body) = get(&mut UnixStream::connect(process.path("metrics")).unwrap(), OPEN_METRICS);
        body.contains("_duration_seconds_count{operation=\"write\"} 1\n")
    });

    let (head, open) = get(&mut UnixStream::connect(process.path("metrics")).unwrap(), OPEN_METRICS);
    let (_, plain) = get(&mut UnixStream::connect(process.path("metrics")).unwrap(), "*/*");

    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("application/openmetrics-text"), "{head}");
    assert!(
        open.contains("vhost_device_vfio_transferred_bytes_total{worker=\"0\",operation=\"write\"} 512\n"),
        "{open}"
    );
    assert!(open.contains("vhost_device_vfio_virtqueue_in_flight{virtqueue=\"1\"} 0\n"), "{open}");
    check_open_metrics(&open);
    check_with_promtool(&plain);
}

/// The rules of OpenMetrics 1.0.0 that a program can break: each family once and together, its metadata first, the suffixes of
/// its type, a unit that its name ends with, cumulative buckets, and the end.
fn check_open_metrics(text: &str) {
    let mut families: Vec<(String, String)> = Vec::new();
    let mut bucket = 0.0;
    assert!(text.ends_with("\n# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(metadata) = line.strip_prefix("# ") {
            let words: Vec<_> = metadata.splitn(3, ' ').collect();
            match words.as_slice() {
                ["TYPE", name, kind] => {
                    assert!(families.iter().all(|(known, _)| known != name), "{name} twice");
                    families.push(((*name).to_owned(), (*kind).to_owned()));
                }
                ["UNIT", name, unit] => assert!(name.ends_with(&format!("_{unit}")), "{line}"),
                ["HELP", name, _] => assert_eq!(*name, families.last().unwrap().0),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap();
        let value: f64 = value.parse().unwrap();
        let (name, kind) = families.last().unwrap();
        let suffix = sample.split('{').next().unwrap().strip_prefix(name.as_str()).unwrap_or_else(|| panic!("{line}"));
        let allowed: &[&str] = match kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("type {other}"),
        };
        assert!(allowed.contains(&suffix) && value >= 0.0, "{line}");
        if suffix == "_bucket" {
            bucket = if sample.contains("le=\"0.000008192\"") { 0.0 } else { bucket };
            assert!(value >= bucket, "not cumulative: {line}");
            bucket = value;
        }
    }
}

/// `scripts/test` names the promtool of Debian's package `prometheus`. Without it the rules above must do.
fn check_with_promtool(text: &str) {
    let Some(path) = std::env::var_os("PROMTOOL") else { return };
    let mut promtool = Command::new(path);
    promtool.args(["check", "metrics"]).stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = promtool.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn metrics_on_a_port_are_for_this_machine_only() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut process = Process::serve_with("size=1M", &["--vfio-user", "--metrics", &address]);
    process.wait_until("metrics are served", |_| TcpStream::connect(&address).is_ok());

    let (head, body) = get(&mut TcpStream::connect(&address).unwrap(), "*/*");

    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("personality=\"vfio-user\"") && !body.contains("_requests_total"), "{body}");
    drop(process);
    let device = ["--device", "emulated:size=1M", "--socket-path", "DIR/s"];
    let refused = Process::run(&[&["--metrics", "0.0.0.0:9100"], device.as_slice()].concat());
    assert!(refused.log.contains("is not a loopback address"), "{}", refused.log);
}

#[test]
fn doctor_has_a_line_for_each_check_and_a_status_for_scripts() {
    let text = Process::run(&["doctor"]);
    let json = Process::run(&["doctor", "--json"]);

    let report: Value = serde_json::from_str(&json.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(text.stdout.lines().count(), checks.len(), "{}", text.stdout);
    for (line, check) in text.stdout.lines().zip(checks) {
        let outcome = check["outcome"].as_str().unwrap();
        assert!(line.to_lowercase().starts_with(outcome) && line.contains(check["check"].as_str().unwrap()), "{line}");
    }
    for layer in ["landlock", "seccomp", "sandbox"] {
        assert_eq!(checks.iter().filter(|check| check["check"] == layer).count(), 1, "{layer}: {}", json.stdout);
    }
    let problem = checks.iter().any(|check| check["outcome"] == "problem");
    assert_eq!((&report["schema"], &report["passed"]), (&json!(1), &json!(!problem)));
    assert_eq!((text.status.success(), json.status.success()), (!problem, !problem));

    let nowhere = Process::run(&["doctor", "ffff:ff:1f.7"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(
        nowhere.stdout.contains("PROBLEM  function             there is no function ffff:ff:1f.7"),
        "{}",
        nowhere.stdout
    );
}

#[test]
fn lines_for_the_journal_begin_with_their_priority() {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg("JOURNAL_STREAM=$(stat -L -c %d:%i /dev/fd/2) exec \"$0\" \"$@\"").arg(PROGRAM);
    // A device that does not enforce snooping is worth a warning.
    let device = "emulated:size=1M,no-snoop=controllable,snoop-enforced=off";
    let mut process = Process::spawn(shell, &["--socket-path", "DIR/socket", "--device", device]);
    process.wait_for_socket();

    let log = process.stop().log;

    assert!(log.lines().all(|line| line.starts_with("<6>") || line.starts_with("<4>")), "{log}");
    assert!(log.contains("<6>vhost_device_vfio: listening on ") && log.contains("<4>"), "{log}");
    let elsewhere = Process::serve("size=1M").stop().log;
    assert!(elsewhere.lines().all(|line| !line.starts_with('<')), "{elsewhere}");
}
