//! Sockets that are inherited or passed by a service manager.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use testbed::client::{Client, Shape};
use vmm_sys_util::tempdir::TempDir;

use crate::process::Process;

fn check_served(socket: UnixStream, process: &Process) {
    let mut client =
        Client::new(socket, Shape::default()).unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()));
    client.write(7, &[0x5a; 512]).unwrap();
    let mut found = [0; 512];
    client.read(7, &mut found).unwrap();
    assert_eq!(found, [0x5a; 512]);
}

#[test]
fn an_inherited_listening_socket_is_served_again_and_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let mut process =
        Process::inheriting(UnixListener::bind(&path).unwrap(), "", &["--fd", "3", "--device", "emulated:size=1M"]);

    for _ in 0..2 {
        check_served(UnixStream::connect(&path).unwrap(), &process);
    }

    assert!(process.stop().status.success());
    assert!(path.exists(), "its creator removes the socket");
}

#[test]
fn an_inherited_connected_socket_is_served_until_its_peer_leaves() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut process = Process::inheriting(theirs, "", &["--fd", "3", "--device", "emulated:size=1M"]);

    check_served(ours, &process);

    assert!(process.wait_for_exit().status.success(), "it exits by itself");
}

#[test]
fn a_socket_passed_by_a_service_manager_is_found() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let process = Process::inheriting(listener, "LISTEN_FDS=1 LISTEN_PID=$$", &["--device", "emulated:size=1M"]);

    check_served(UnixStream::connect(&path).unwrap(), &process);
}

#[test]
fn a_socket_passed_to_another_process_is_not_used() {
    let listener = UnixListener::bind(TempDir::new().unwrap().as_path().join("socket")).unwrap();
    let output =
        Process::inheriting(listener, "LISTEN_FDS=1 LISTEN_PID=1", &["--device", "emulated:size=1M"]).wait_for_exit();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.log.contains("no socket; give --socket-path or --fd"), "{}", output.log);
}

#[test]
fn anything_but_exactly_one_passed_socket_is_refused() {
    for count in ["2", "0", "some"] {
        let listener = UnixListener::bind(TempDir::new().unwrap().as_path().join("socket")).unwrap();
        let variables = format!("LISTEN_FDS={count} LISTEN_PID=$$");
        let output = Process::inheriting(listener, &variables, &["--device", "emulated:size=1M"]).wait_for_exit();
        assert_eq!(output.status.code(), Some(1));
        let error =
            format!("LISTEN_FDS={count}: exactly one socket can be served; give the socket unit one ListenStream=");
        assert!(output.log.contains(&error), "{}", output.log);
    }
}

#[test]
fn a_descriptor_that_is_not_an_open_stream_socket_is_refused() {
    let closed = Process::run(&["--fd", "99", "--device", "emulated:size=1M"]);
    assert!(closed.log.contains("file descriptor 99 is not a UNIX stream socket"), "{}", closed.log);
    let file = std::fs::File::open("/dev/null").unwrap();
    let datagrams = UnixDatagram::unbound().unwrap();
    let network = TcpListener::bind("127.0.0.1:0").unwrap();
    for wrong in [OwnedFd::from(file), datagrams.into(), network.into()] {
        let output = Process::inheriting(wrong, "", &["--fd", "3", "--device", "emulated:size=1M"]).wait_for_exit();
        assert!(output.log.contains("file descriptor 3 is not a UNIX stream socket"), "{}", output.log);
        assert_eq!((closed.status.code(), output.status.code()), (Some(1), Some(1)));
    }
}

#[test]
fn the_socket_has_the_mode_the_group_and_the_user_that_were_given() {
    let own = rustix::process::getegid().as_raw().to_string();
    let user = rustix::process::geteuid().as_raw().to_string();
    let access = ["--socket-mode", "0620", "--socket-group", &own, "--socket-user", &user];

    let mut process = Process::serve_with("size=1M", &access);

    let file = std::fs::symlink_metadata(process.path("socket")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o620, "whatever the umask is");
    assert_eq!((file.gid().to_string(), file.uid().to_string()), (own.clone(), user.clone()));
    let line = format!("socket (mode 620, uid {user}, gid {own})");
    process.wait_until("the log has it", |process| process.log().contains(&line));
    check_served(UnixStream::connect(process.path("socket")).unwrap(), &process);
    let peer = format!("(pid {}, uid {user})", std::process::id());
    process.wait_until("the log has the front-end", |process| process.log().contains(&peer));
}

#[test]
fn a_mode_or_a_group_that_cannot_be_is_refused_before_anything_else() {
    for (option, value, fix) in [
        ("--socket-mode", "0888", "give 0660 for the user and the group"),
        ("--socket-group", "no-such-group", "create it, or give a number"),
        ("--socket-user", "no-such-user", "create it, or give a number"),
    ] {
        let output = Process::run(&["--socket-path", "DIR/socket", option, value, "--device", "emulated:size=1M"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(output.log.contains(option) && output.log.contains(fix), "{}", output.log);
    }
    let output = Process::run(&["--fd", "3", "--socket-mode", "0660", "--device", "emulated:size=1M"]);
    assert!(output.log.contains("cannot be used with"), "an inherited socket has its mode: {}", output.log);
}
