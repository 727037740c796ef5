//! The emulated function served whole by the program: every way to pass it a socket, and what it refuses.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::tempdir::TempDir;

use crate::process::{LIMIT, Process};

const WHOLE: [&str; 3] = ["--vfio-user", "--device", "emulated:size=1M"];
const VERSION: u16 = 1;
const DEVICE_GET_INFO: u16 = 4;

/// Sends a command without descriptors, and returns the payload of its reply.
fn call(socket: &mut UnixStream, command: u16, payload: &[u8]) -> Vec<u8> {
    let size = 16 + u32::try_from(payload.len()).unwrap();
    let header = [&1_u16.to_le_bytes()[..], &command.to_le_bytes(), &size.to_le_bytes(), &[0; 8]].concat();
    socket.write_all(&[&header, payload].concat()).unwrap();
    let mut reply = [0; 16];
    socket.read_exact(&mut reply).unwrap();
    let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
    assert_eq!((word(8), word(12)), (1, 0), "flags: a reply without an error; errno");
    let mut payload = vec![0; word(4) as usize - 16];
    socket.read_exact(&mut payload).unwrap();
    payload
}

/// Negotiates a version, and asks for the device: a PCI function with 9 regions.
fn check_served(mut socket: UnixStream) {
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    call(&mut socket, VERSION, &[0, 0, 1, 0]);
    let info = call(&mut socket, DEVICE_GET_INFO, &[16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(info[8..12], 9_u32.to_le_bytes());
}

#[test]
fn a_whole_function_is_served_on_an_inherited_listening_socket_again_and_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut process = Process::inheriting(listener, "", &[&WHOLE[..], &["--fd", "3"]].concat());

    for _ in 0..2 {
        check_served(UnixStream::connect(&path).unwrap());
    }

    assert!(process.stop().status.success());
}

#[test]
fn a_whole_function_is_served_on_an_inherited_connected_socket_until_its_peer_leaves() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut process = Process::inheriting(theirs, "", &[&WHOLE[..], &["--fd", "3"]].concat());

    check_served(ours);

    assert!(process.wait_for_exit().status.success(), "it exits by itself");
}

#[test]
fn a_whole_function_is_served_on_a_socket_passed_by_a_service_manager() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let _process = Process::inheriting(listener, "LISTEN_FDS=1 LISTEN_PID=$$", &WHOLE);

    check_served(UnixStream::connect(&path).unwrap());
}

#[test]
fn a_whole_function_cannot_be_read_only() {
    let output = Process::run(&[&WHOLE[..], &["--socket-path", "DIR/socket", "--read-only"]].concat());

    assert!(!output.status.success());
    assert!(output.log.contains("--read-only: the guest's own driver drives a whole function"), "{}", output.log);
}
