//! The command line, mainly its errors: one line, an exit status, and no side effects.

use std::fs;

use crate::process::{PROGRAM, Process};

#[test]
fn capabilities_are_printed_without_a_device_or_a_socket() {
    let output = Process::run(&["--print-capabilities"]);
    assert!(output.status.success());
    assert_eq!(output.stdout.trim(), r#"{"type":"block","features":["read-only"]}"#);
    assert_eq!(output.log, "");
}

#[test]
fn every_usage_error_has_its_message_and_status_2() {
    for (arguments, message) in [
        (&["--device"][..], "a value is required"),
        (&["--device", "nvme0"], "such as 0000:00:04.0; or fd=FDNUM, or emulated"),
        (&["--socket-path", "DIR/socket"], "--device"),
        (&["--device", "emulated", "--socket-path", "DIR/socket", "--fd", "3"], "cannot be used with"),
        (&["--device", "emulated", "--queues", "0"], "0 is not in 1..=64"),
        (&["--device", "emulated", "--no-snoop", "perhaps"], "possible values: suppress, allow, refuse, assume"),
        (&["--device", "emulated", "--poll-us", "long"], "--poll-us"),
        (&["--device", "emulated", "--cpus", "4-2"], "numbers below 1024 and ranges, such as 2-5,8"),
        (&["--device", "emulated", "--vfio-user", "--cpus", "1"], "cannot be used with"),
        (&["--device", "emulated", "--timeout-ms", "0"], "0 is not in 1.."),
        (&["--device", "emulated", "--qmp-socket", "/run/qmp"], "--vfio-user"),
        (&["--device", "emulated", "--vfio-user", "--qmp-device", "nic"], "--qmp-socket"),
        (&["--device", "emulated", "--nonesuch"], "unexpected argument"),
    ] {
        let output = Process::run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", output.log);
        assert!(output.log.contains(message), "{arguments:?}: {}", output.log);
        assert_eq!(output.stdout, "");
    }
}

#[test]
fn an_invalid_option_of_the_emulated_function_is_one_line_and_creates_nothing() {
    for (options, message) in [
        ("sise=1G", "unknown option `sise`; the options are size, "),
        ("size=1000", "size: wanted a multiple of the logical block, found 1000"),
        ("size=1X", "size=1X: wanted bytes"),
        ("lba=513", "lba: wanted 512 or 4096, found 513"),
        ("size=0", "size=0: wanted at least one logical block"),
        ("lba=many", "lba=many: wanted a small whole number"),
        ("queues=0", "queues: wanted 1 to 1023, found 0"),
        ("queues=1024", "queues: wanted 1 to 1023, found 1024"),
        ("entries=1", "queue entries: wanted at least 2, found 1"),
        ("mdts=16", "mdts: wanted 0 to 15, found 16"),
        ("stride=9", "doorbell stride: wanted 0 to 8, found 9"),
        ("width=12", "address width: wanted 16 to 57, found 12"),
        ("sgl=yes", "sgl=yes: wanted on or off"),
        ("wcache=1", "wcache=1: wanted on or off"),
        ("interrupts=no", "interrupts=no: wanted on or off"),
        ("create=always,file=DIR/made", "create=always: wanted on or off"),
        ("sparse=no,file=DIR/made,create=on", "sparse=no: wanted on or off"),
        ("no-snoop=on", "no-snoop=on: wanted never or controllable"),
        ("snoop-enforced=never", "snoop-enforced=never: wanted on or off"),
        ("mode=fast", "mode=fast: wanted inline or threaded"),
        ("serial=longer-than-twenty-characters", "serial: wanted at most 20 ASCII characters"),
        ("medium=tape", "medium=tape: wanted memory or null"),
        ("file=DIR/missing", "open DIR/missing: No such file or directory"),
        ("file=DIR/missing,create=on", "open DIR/missing: No such file or directory"),
        ("file=DIR/no/such,create=on,size=1M", "create DIR/no/such: No such file or directory"),
        ("file=DIR/made,create=on,size=1000", "size: wanted a multiple of the logical block"),
        ("file=DIR", "open DIR: Is a directory"),
        // Even root cannot open a running program for writing.
        ("file=PROGRAM", "open PROGRAM: Text file busy"),
        ("latency=soon", "latency=soon: wanted"),
        ("faults=DIR/missing", "faults=DIR/missing: No such file or directory"),
        ("file=DIR/log", "size: wanted a file of whole logical blocks, at least one"),
    ] {
        let device = format!("emulated:{}", options.replace("PROGRAM", PROGRAM));
        let mut process = Process::start(&["--socket-path", "DIR/socket", "--device", &device]);
        let output = process.wait_for_exit();
        let directory = process.path("");
        let expected =
            message.replace("DIR", directory.to_str().unwrap().trim_end_matches('/')).replace("PROGRAM", PROGRAM);
        assert_eq!(output.status.code(), Some(2), "{options}: {}", output.log);
        assert!(output.log.contains(&expected), "{options}: {}", output.log);
        assert_eq!(output.log.lines().count(), 1, "{options}: {}", output.log);
        let mut left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["log", "stdout"], "{options}");
    }
}

#[test]
fn a_file_of_another_size_is_not_changed() {
    let mut first = Process::serve("file=DIR/disk,create=on,size=1M");
    let path = first.path("disk");
    first.stop();
    let device = format!("emulated:size=2M,file={}", path.display());

    let output = Process::run(&["--socket-path", "DIR/socket", "--device", &device]);

    assert_eq!(output.status.code(), Some(2));
    assert!(output.log.contains("has 1048576 bytes, but size=2097152 was given"), "{}", output.log);
    assert_eq!(fs::metadata(path).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_in_use_is_not_shared() {
    let mut first = Process::serve("file=DIR/disk,create=on,size=1M");
    let device = format!("emulated:file={}", first.path("disk").display());

    let output = Process::run(&["--socket-path", "DIR/socket", "--device", &device]);

    assert_eq!(output.status.code(), Some(2));
    assert!(output.log.contains("is another process using it?"), "{}", output.log);
    first.stop();
}

#[test]
fn a_socket_in_use_is_refused_with_its_user_and_no_disk_is_created() {
    let first = Process::serve("size=1M");
    let path = first.path("socket");

    let mut second = Process::start(&[
        "--socket-path",
        path.to_str().unwrap(),
        "--device",
        "emulated:size=1M,file=DIR/disk,create=on",
    ]);
    let output = second.wait_for_exit();

    assert_eq!(output.status.code(), Some(1));
    assert!(output.log.contains("is in use by"), "{}", output.log);
    assert!(!second.path("disk").exists());
}

#[test]
fn a_namespace_that_does_not_exist_is_an_error() {
    let output = Process::run(&["--socket-path", "DIR/socket", "--device", "emulated:size=1M", "--namespace", "7"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.log.contains("namespace 7"), "{}", output.log);
}
