//! How it ends when it is told to, whatever it is doing.

use std::os::unix::net::UnixStream;

use rustix::process::Signal;

use crate::process::Process;

#[test]
fn either_signal_ends_it_and_removes_the_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut process = Process::serve("size=1M");
        process.signal(signal);

        let ended = process.end();

        assert!(ended.status.success(), "{:?}: {}", ended.status, ended.log);
        assert!(ended.log.contains("statistics: reads=0"), "{}", ended.log);
        assert!(!process.path("socket").exists());
    }
}

#[test]
fn it_ends_while_a_front_end_is_connected_or_is_in_the_middle_of_a_message() {
    let mut process = Process::serve("size=1M");
    let mut client = process.client();
    client.write(0, &[1; 4096]).unwrap();

    let ended = process.stop();

    assert!(ended.status.success(), "{}", ended.log);
    assert!(ended.log.contains("writes=1 "), "{}", ended.log);
    assert!(client.stop(0).is_err(), "nobody is there");

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
    assert!(!first.end().status.success());
    assert!(path.exists());

    let path = path.to_str().unwrap();
    let mut second = Process::start(&["--socket-path", path, "--device", "emulated:size=1M"]);
    second.wait_until("it listens", |_| UnixStream::connect(path).is_ok());

    assert!(second.stop().status.success());
}
