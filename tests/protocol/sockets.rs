//! Sockets: a path that is free, in use, stale or invalid; a descriptor passed in.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use vhost_device_vfio::socket::{Listen, SocketError};
use vmm_sys_util::tempdir::TempDir;

use crate::rig::Rig;
use crate::wire::Wire;

#[test]
fn a_stale_socket_is_replaced() {
    let rig = Rig::on_socket(|path| {
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "stale");
        Listen::Path(path)
    });
    rig.connect().negotiate();
}

#[test]
fn a_file_of_another_program_is_not_removed() {
    let rig = Rig::new();
    let path = rig.path.clone();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "someone else's").unwrap();

    rig.stop_then(|| assert_eq!(std::fs::read_to_string(&path).unwrap(), "someone else's"));
}

#[test]
fn a_listening_descriptor_is_served_and_its_path_is_not_removed() {
    let rig = Rig::on_socket(|path| Listen::Fd(UnixListener::bind(path).unwrap().into()));
    for _ in 0..2 {
        rig.connect().negotiate();
    }
    let path = rig.path.clone();
    rig.stop_then(|| assert!(path.exists()));
}

#[test]
fn a_descriptor_that_is_not_a_stream_socket_is_refused() {
    let (datagrams, _peer) = UnixDatagram::pair().unwrap();
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    for fd in [datagrams.into(), file] {
        let refused = crate::rig::open(Listen::Fd(fd));
        assert!(matches!(refused, Err(SocketError::NotASocket { .. })), "{:?}", refused.err());
    }
}

#[test]
fn a_path_in_use_is_refused_with_its_user() {
    let rig = Rig::new();
    let refused = crate::rig::open(Listen::Path(rig.path.clone()));
    let message = refused.err().expect("refused").to_string();
    assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
    Wire::new(std::os::unix::net::UnixStream::connect(&rig.path).unwrap()).sync();
}

#[test]
fn invalid_paths_are_refused_with_the_reason() {
    let directory = TempDir::new().unwrap();
    let long = directory.as_path().join("x".repeat(108));
    let file = directory.as_path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let nowhere = directory.as_path().join("no/such/directory");

    assert!(matches!(crate::rig::open(Listen::Path(long)), Err(SocketError::PathTooLong { .. })));
    assert!(matches!(crate::rig::open(Listen::Path(file.clone())), Err(SocketError::NotASocketFile { .. })));
    assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
    match crate::rig::open(Listen::Path(nowhere)) {
        Err(SocketError::Path { step: "bind", source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::ENOENT)),
        other => panic!("{:?}", other.err()),
    }
}
