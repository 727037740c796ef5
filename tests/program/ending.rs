//! Termination by a signal in different states.

use std::os::unix::net::UnixStream;

use rustix::process::Signal;

use crate::process::Process;

#[test]
fn sigterm_and_sigint_end_it_and_remove_the_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut process = Process::serve("size=1M");
        process.signal(signal);

        let output = process.wait_for_exit();

        assert!(output.status.success(), "{:?}: {}", output.status, output.log);
        assert!(output.log.contains("statistics: reads=0"), "{}", output.log);
        assert!(!process.path("socket").exists());
    }
}

#[test]
fn it_ends_while_a_front_end_is_connected_or_is_in_the_middle_of_a_message() {
    let mut process = Process::serve("size=1M");
    let mut client = process.client();
    client.write(0, &[1; 4096]).unwrap();

    let output = process.stop();

    assert!(output.status.success(), "{}", output.log);
    assert!(output.log.contains("writes=1 "), "{}", output.log);
    assert!(client.stop(0).is_err(), "the connection is closed");

    let mut process = Process::serve("size=1M");
    let stream = UnixStream::connect(process.path("socket")).unwrap();
    rustix::io::write(&stream, &[1, 0, 0]).unwrap();
    assert!(process.stop().status.success());
}

#[test]
fn a_killed_process_leaves_a_socket_that_the_next_one_replaces() {
    let mut first = Process::serve("size=1M");
    let path = first.path("socket");
    first.signal(Signal::KILL);
    assert!(!first.wait_for_exit().status.success());
    assert!(path.exists());

    let path = path.to_str().unwrap();
    let mut second = Process::start(&["--socket-path", path, "--device", "emulated:size=1M"]);
    second.wait_until("it listens", |_| UnixStream::connect(path).is_ok());

    assert!(second.stop().status.success());
}
