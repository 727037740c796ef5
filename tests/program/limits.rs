//! The limits under which the program runs.

use std::os::unix::net::UnixListener;

use vmm_sys_util::tempdir::TempDir;

use crate::process::Process;

#[test]
fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
    let directory = TempDir::new().unwrap();
    let listener = UnixListener::bind(directory.as_path().join("socket")).unwrap();
    let arguments = ["--fd", "3", "--device", "emulated:size=1M", "--log-level", "debug"];
    let mut process = Process::inheriting(listener, "ulimit -S -n 200; ulimit -H -n 300;", &arguments);
    process.wait_until("it serves", |process| process.log().contains("serving emulated"));

    let limits = process.limits();

    let open_files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(open_files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["300", "300"]);
    assert!(process.log().contains("RLIMIT_NOFILE: raised from 200 to 300"), "{}", process.log());
}
