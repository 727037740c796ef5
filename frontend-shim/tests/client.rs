//! The client against misbehaving listeners, and against a real server without a VM.
#![expect(clippy::unwrap_used, reason = "a test may")]

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kvm_vfio_shim::wire::{Kind, Reply, Request};
use kvm_vfio_shim::{Client, ClientError, Config, Policy, Reason, Server, Status, Vm};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, recv, send,
    socket_with,
};

const SHORT: Duration = Duration::from_millis(100);

struct Path(PathBuf);

impl Path {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("shim-client-{}-{name}.sock", std::process::id())))
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.0);
    }
}

fn listener(path: &Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(&path.0).unwrap()).unwrap();
    listen(&socket, 1).unwrap();
    socket
}

/// Accepts one connection and answers each request with what `answer` returns for its bytes; `None` closes.
fn script(listener: OwnedFd, answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) {
    thread::spawn(move || {
        let socket = accept(&listener).unwrap();
        let mut bytes = [0; 64];
        while let Ok((length @ 1.., _)) = recv(&socket, &mut bytes, RecvFlags::empty()) {
            let Some(reply) = answer(&bytes[..length]) else { return };
            send(&socket, &reply, SendFlags::NOSIGNAL).unwrap();
        }
    });
}

fn good_reply(bytes: &[u8]) -> Reply {
    Reply { serial: Request::from_bytes(bytes).unwrap().serial, outcome: Ok(0), status: Status::default() }
}

#[test]
fn the_error_for_a_path_without_a_listener_says_how_to_start_one() {
    let path = Path::new("absent");
    let error = Client::connect(&path.0, SHORT).unwrap_err();
    assert!(matches!(error, ClientError::NotListening(..)), "{error}");
    assert!(error.to_string().contains("LD_PRELOAD=libkvm_vfio_shim.so"), "{error}");

    drop(listener(&path));
    let error = Client::connect(&path.0, SHORT).unwrap_err();
    assert!(matches!(error, ClientError::NotListening(..)), "left by a VMM that has exited: {error}");
}

#[test]
fn a_listener_that_never_answers_times_out() {
    let path = Path::new("silent");
    let _listener = listener(&path);
    let error = Client::connect(&path.0, SHORT).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut(..)), "{error}");
}

#[test]
fn connecting_to_a_full_backlog_times_out() {
    let path = Path::new("backlog");
    let _listener = listener(&path);
    for _ in 0..4 {
        let error = Client::connect(&path.0, SHORT).unwrap_err();
        assert!(matches!(error, ClientError::TimedOut(..)), "{error}");
    }
}

#[test]
fn another_version_is_named() {
    let path = Path::new("version");
    script(listener(&path), |bytes| {
        let mut reply = good_reply(bytes).to_bytes();
        reply[4] = 3;
        Some(reply.into())
    });
    let error = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::Version(_, 3)), "{error}");
}

#[test]
fn random_bytes_and_the_answer_to_another_request_are_malformed() {
    for (name, wrong_serial) in [("noise", false), ("serial", true)] {
        let path = Path::new(name);
        script(listener(&path), move |bytes| {
            let reply = Reply { serial: 99, ..good_reply(bytes) };
            Some(if wrong_serial { reply.to_bytes().into() } else { vec![1, 2, 3] })
        });
        let error = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap_err();
        assert!(matches!(error, ClientError::Malformed(_)), "{name}: {error}");
    }
}

#[test]
fn after_a_late_answer_the_connection_is_unusable() {
    let path = Path::new("late");
    script(listener(&path), |bytes| {
        if Request::from_bytes(bytes).unwrap().kind != Kind::Hello {
            thread::sleep(4 * SHORT);
        }
        Some(good_reply(bytes).to_bytes().into())
    });
    let (mut client, _) = Client::connect(&path.0, SHORT).unwrap();
    assert!(matches!(client.query().unwrap_err(), ClientError::TimedOut(..)));
    assert!(client.socket().is_none());
    assert!(matches!(client.query().unwrap_err(), ClientError::Closed(_)));
}

#[test]
fn a_vmm_that_exits_is_noticed() {
    let path = Path::new("gone");
    script(listener(&path), |bytes| {
        let hello = Request::from_bytes(bytes).unwrap().kind == Kind::Hello;
        hello.then(|| good_reply(bytes).to_bytes().into())
    });
    let (mut client, _) = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap();
    assert!(matches!(client.query().unwrap_err(), ClientError::Closed(_)));
}

/// A server in its own thread, as in a VMM. It runs until the test program ends.
fn server(path: &Path, policy: Policy) -> &'static Vm {
    let vm: &'static Vm = Box::leak(Box::default());
    let config = Config { socket: path.0.clone(), policy, peer: None, log: |_| () };
    let mut server = Server::new(&config, vm).unwrap();
    thread::spawn(move || server.run());
    vm
}

#[test]
fn without_a_vm_a_coherent_device_can_be_registered_but_not_a_non_coherent_one() {
    let path = Path::new("no-vm");
    let vm = server(&path, Policy::Lock);
    let (mut client, status) = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap();
    assert_eq!((status.vms, status.started_ms, status.vmm_pid), (0, 0, std::process::id()));

    let registration = client.register_coherent().unwrap();
    assert!(vm.pinned());
    client.unregister(registration.handle).unwrap();
    assert!(!vm.pinned());

    let null = std::fs::File::open("/dev/null").unwrap();
    let ClientError::Refused(refused) = client.register_non_coherent(&null).unwrap_err() else {
        panic!("the request is refused and the connection stays open");
    };
    assert_eq!(refused.refusal.reason, Reason::NotVfio);
    assert!(!vm.pinned());
    client.query().unwrap();
}

#[test]
fn a_client_that_disconnects_removes_its_pin() {
    let path = Path::new("guard");
    let vm = server(&path, Policy::Lock);
    let (mut one, _) = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap();
    let (mut two, _) = Client::connect(&path.0, Client::DEFAULT_TIMEOUT).unwrap();
    one.register_coherent().unwrap();
    two.register_coherent().unwrap();

    drop(one);
    while two.query().unwrap().registered > 1 {
        thread::sleep(Duration::from_millis(60));
    }
    assert!(vm.pinned());
    drop(two);
    while vm.pinned() {
        thread::yield_now();
    }
}
