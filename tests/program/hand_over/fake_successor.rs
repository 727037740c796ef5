//! A successor that stops at a chosen step. It is a process of its own, because the predecessor ends it: this test program, started
//! again to run [`fake_successor`] alone. It speaks the protocol in its own words.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recvmsg, send, socket_with,
};

const STEP: &str = "FAKE_SUCCESSOR_STEP";
const SOCKET: &str = "FAKE_SUCCESSOR_SOCKET";
const DEVICE: &str = "FAKE_SUCCESSOR_DEVICE";

/// Longer than any step of the predecessor.
const LIMIT: Duration = Duration::from_secs(40);

pub(super) struct FakeSuccessor {
    child: Child,
}

impl FakeSuccessor {
    /// Where it dies.
    pub(super) const STEPS: [&'static str; 8] =
        ["before-hello", "garbage", "hello", "session", "descriptors", "failed", "ready", "go"];

    pub(super) fn start(step: &str, socket: &Path, device: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--ignored", "hand_over::fake_successor::fake_successor"]);
        command.env(STEP, step).env(SOCKET, socket).env(DEVICE, device);
        Self { child: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap() }
    }

    pub(super) fn wait_for_end(&mut self) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LIMIT, "it is not ended");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for FakeSuccessor {
    fn drop(&mut self) {
        // Without effect if it has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn say(socket: &OwnedFd, text: &str) {
    send(socket, text.as_bytes(), SendFlags::NOSIGNAL).unwrap();
}

/// The next message, and the number of its descriptors.
fn hear(socket: &OwnedFd) -> (String, usize) {
    let (mut bytes, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let seen = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let count = control.drain().map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.count(),
        _ => 0,
    });
    let count = count.sum();
    (String::from_utf8(bytes[..seen.bytes].to_vec()).unwrap(), count)
}

#[test]
#[ignore = "no test: the process that the tests above start"]
fn fake_successor() {
    let Ok(step) = std::env::var(STEP) else { return };
    let address = SocketAddrUnix::new(std::env::var(SOCKET).unwrap()).unwrap();
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    connect(&socket, &address).unwrap();
    let dies = |here: &str| {
        if step == here {
            std::process::exit(0)
        }
    };
    let silent = |here: &str| {
        if step == here {
            std::thread::sleep(LIMIT);
        }
    };
    dies("before-hello");
    if step == "garbage" {
        say(&socket, "{\"hello\":[\"\u{0}\"]}");
        assert!(hear(&socket).0.contains("refused"));
    }
    dies("garbage");
    let device = std::env::var(DEVICE).unwrap();
    let terms = format!(
        r#"{{"device":"{device}","queues":2,"namespace":null,"read_only":false,"no_snoop":"suppress","kvm_socket":null}}"#
    );
    let pid = std::process::id();
    say(&socket, &format!(r#"{{"hello":{{"version":1,"program":"fake","pid":{pid},"terms":{terms}}}}}"#));
    dies("hello");
    let (session, _) = hear(&socket);
    let announced = session.strip_prefix(r#"{"session":{"descriptors":"#).expect(&session);
    let announced: usize = announced.trim_end_matches('}').parse().unwrap();
    dies("session");
    let mut count = 0;
    while count < announced {
        count += hear(&socket).1;
    }
    dies("descriptors");
    silent("silent-before-ready");
    if step == "failed" {
        say(&socket, r#"{"failed":"no reason at all"}"#);
        std::thread::sleep(LIMIT);
    }
    say(&socket, "\"ready\"");
    dies("ready");
    assert_eq!(hear(&socket).0, "\"go\"");
    dies("go");
    silent("silent-after-go");
}
