//! A storm of front-ends writes a bounded number of lines, and the log says how many it left out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::process::Process;

/// More than anybody could read; without a limit each writes two lines or more.
const FRONT_ENDS: u32 = 1500;
/// Lines of the start and of the end, and two intervals of every limited kind that these front-ends cause: connections,
/// refusals and front-ends that are sent away.
const MOST_LINES: usize = 400;

/// Connects, sends what is no message, and waits until the program has closed the connection.
fn storm(process: &Process) {
    for seed in 0..FRONT_ENDS {
        let mut socket = UnixStream::connect(process.path("socket")).unwrap();
        let garbage: Vec<u8> =
            (0..64_u32).map(|n| (seed.wrapping_mul(2_654_435_761) >> (n % 24)).to_le_bytes()[0]).collect();
        // The program may have closed it before all is sent.
        let _ = socket.write_all(&garbage);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = socket.read_to_end(&mut Vec::new());
    }
}

fn check_bounded(mut process: Process) {
    storm(&process);

    let log = process.stop().log;

    let lines = log.lines().count();
    assert!(lines <= MOST_LINES, "{lines} lines:\n{log}");
    let left_out =
        |line: &str| line.split_once('(')?.1.split_once(" similar messages suppressed")?.0.parse::<u32>().ok();
    let left_out: u32 = log.lines().filter_map(left_out).sum();
    assert!(left_out >= FRONT_ENDS, "{left_out} lines left out:\n{log}");
}

#[test]
fn a_storm_of_vhost_user_front_ends_writes_a_bounded_number_of_lines() {
    check_bounded(Process::serve("size=1M"));
}

#[test]
fn a_storm_of_vfio_user_front_ends_writes_a_bounded_number_of_lines() {
    check_bounded(Process::serve_with("size=1M", &["--vfio-user"]));
}
