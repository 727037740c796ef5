//! What the command line answers, above all to mistakes: one line, an exit status, and nothing made or changed.

use std::fs;

use crate::process::{PROGRAM, Process};

#[test]
fn capabilities_are_printed_without_a_device_or_a_socket() {
    let ended = Process::run(&["--print-capabilities"]);
    assert!(ended.status.success());
    assert_eq!(ended.stdout.trim(), r#"{"type":"block","features":["read-only"]}"#);
    assert_eq!(ended.log, "");
}

#[test]
fn every_mistake_has_its_message_and_status_2() {
    for (arguments, message) in [
        (&["--device"][..], "a value is required"),
        (&["--device", "nvme0"], "such as 0000:00:04.0; or emulated"),
        (&["--socket-path", "DIR/socket"], "--device"),
        (&["--device", "emulated", "--socket-path", "DIR/socket", "--fd", "3"], "cannot be used with"),
        (&["--device", "emulated", "--queues", "0"], "0 is not in 1..=64"),
        (&["--device", "emulated", "--no-snoop", "perhaps"], "possible values: suppress, allow, refuse, assume"),
        (&["--device", "emulated", "--poll-us", "long"], "--poll-us"),
        (&["--device", "emulated", "--timeout-ms", "0"], "0 is not in 1.."),
        (&["--device", "emulated", "--nonesuch"], "unexpected argument"),
    ] {
        let ended = Process::run(arguments);
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {}", ended.log);
        assert!(ended.log.contains(message), "{arguments:?}: {}", ended.log);
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn a_wrong_option_of_the_emulated_function_is_one_line_and_makes_nothing() {
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
        // Even root cannot write to a program that runs.
        ("file=PROGRAM", "open PROGRAM: Text file busy"),
        ("latency=soon", "latency=soon: wanted"),
        ("faults=DIR/missing", "faults=DIR/missing: No such file or directory"),
        ("file=DIR/log", "size: wanted a file of whole logical blocks, at least one"),
    ] {
        let device = format!("emulated:{}", options.replace("PROGRAM", PROGRAM));
        let mut process = Process::start(&["--socket-path", "DIR/socket", "--device", &device]);
        let ended = process.end();
        let directory = process.path("");
        let wanted =
            message.replace("DIR", directory.to_str().unwrap().trim_end_matches('/')).replace("PROGRAM", PROGRAM);
        assert_eq!(ended.status.code(), Some(2), "{options}: {}", ended.log);
        assert!(ended.log.contains(&wanted), "{options}: {}", ended.log);
        assert_eq!(ended.log.lines().count(), 1, "{options}: {}", ended.log);
        let mut left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["log", "stdout"], "{options}");
    }
}

#[test]
fn a_file_of_another_size_is_left_as_it_is() {
    let mut first = Process::serve("file=DIR/disk,create=on,size=1M");
    let path = first.path("disk");
    first.stop();
    let device = format!("emulated:size=2M,file={}", path.display());

    let ended = Process::run(&["--socket-path", "DIR/socket", "--device", &device]);

    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.log.contains("has 1048576 bytes, the disk was to have 2097152"), "{}", ended.log);
    assert_eq!(fs::metadata(path).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_in_use_is_not_shared() {
    let mut first = Process::serve("file=DIR/disk,create=on,size=1M");
    let device = format!("emulated:file={}", first.path("disk").display());

    let ended = Process::run(&["--socket-path", "DIR/socket", "--device", &device]);

    assert_eq!(ended.status.code(), Some(2));
    assert!(ended.log.contains("is another process using it?"), "{}", ended.log);
    first.stop();
}

#[test]
fn a_socket_in_use_names_its_holder_and_no_disk_is_made() {
    let first = Process::serve("size=1M");
    let path = first.path("socket");

    let mut second = Process::start(&[
        "--socket-path",
        path.to_str().unwrap(),
        "--device",
        "emulated:size=1M,file=DIR/disk,create=on",
    ]);
    let ended = second.end();

    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.log.contains("is in use by"), "{}", ended.log);
    assert!(!second.path("disk").exists());
}

#[test]
fn a_namespace_that_is_not_there_is_an_error_with_the_list_of_those_that_are() {
    let ended = Process::run(&["--socket-path", "DIR/socket", "--device", "emulated:size=1M", "--namespace", "7"]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.log.contains("namespace 7"), "{}", ended.log);
}
