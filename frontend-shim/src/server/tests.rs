use super::*;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
    connect, recv, sendmsg, socket_with,
};

use crate::registry::tests::FakeVm;
use crate::wire::{Policy, REPLY_BYTES};

/// A service with its own socket.
struct TestServer<'a> {
    service: Service<'a, FakeVm>,
    path: PathBuf,
}

impl Drop for TestServer<'_> {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.path);
    }
}

fn fresh_path() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("shim-{}-{}.sock", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    std::env::temp_dir().join(name)
}

fn shim(vm: &FakeVm) -> TestServer<'_> {
    let path = fresh_path();
    let config = Config { socket: path.clone(), policy: Policy::Dynamic, peer: None, log: |_| () };
    let listener = listener::listen_at(&path, None).unwrap();
    TestServer { service: Service::new(listener, &config, vm), path }
}

/// The peer's end of a connection. Unlike [`crate::Client`], it can send invalid messages.
struct RawPeer(OwnedFd);

impl RawPeer {
    fn connect(shim: &mut TestServer<'_>) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(&shim.path).unwrap()).unwrap();
        shim.poll_once();
        Self(socket)
    }

    fn greeted(shim: &mut TestServer<'_>) -> Self {
        let peer = Self::connect(shim);
        peer.request(shim, Kind::Hello, &[]).expect("a reply").outcome.unwrap();
        peer
    }

    /// False if the shim has closed.
    fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(files)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags).is_ok()
    }

    /// A pending reply, or `None`.
    fn receive(&self) -> Option<Reply> {
        let mut bytes = [0; REPLY_BYTES];
        let (length, _) = recv(&self.0, &mut bytes, RecvFlags::DONTWAIT).ok()?;
        Reply::from_bytes(&bytes[..length]).ok()
    }

    fn closed(&self) -> bool {
        while self.receive().is_some() {}
        let mut byte = [0];
        !matches!(recv(&self.0, &mut byte, RecvFlags::DONTWAIT), Err(Errno::AGAIN))
    }

    fn request(&self, shim: &mut TestServer<'_>, kind: Kind, files: &[BorrowedFd<'_>]) -> Option<Reply> {
        assert!(self.send(&Request { serial: 7, kind }.to_bytes(), files));
        shim.poll_once();
        self.receive()
    }
}

impl TestServer<'_> {
    fn poll_once(&mut self) {
        self.service.poll_once(Some(Duration::ZERO));
    }
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

fn reason(reply: Option<Reply>) -> Option<Reason> {
    reply.and_then(|reply| reply.outcome.err()).map(|refusal| refusal.reason)
}

#[test]
fn a_conversation_from_hello_to_unregister() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let peer = RawPeer::greeted(&mut shim);

    let registered = peer.request(&mut shim, Kind::Register(Dma::NonCoherent), &[null().as_fd()]).unwrap();
    assert_eq!(vm.pins.get(), 1);
    assert_eq!((registered.serial, registered.status.registered, registered.status.told), (7, 1, 1));
    let handle = registered.outcome.unwrap();

    vm.started.set(true);
    let asked = peer.request(&mut shim, Kind::Query, &[]).unwrap();
    assert_eq!((asked.status.started_ms, asked.status.vms), (1, 1));

    let left = peer.request(&mut shim, Kind::Unregister(handle), &[]).unwrap();
    assert_eq!((left.outcome, left.status.registered, vm.pins.get()), (Ok(handle), 0, 0));
}

#[test]
fn a_connection_that_ends_removes_its_own_registrations_only() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let (dies, lives) = (RawPeer::greeted(&mut shim), RawPeer::greeted(&mut shim));
    for peer in [&dies, &lives] {
        peer.request(&mut shim, Kind::Register(Dma::NonCoherent), &[null().as_fd()]).unwrap();
    }

    drop(dies);
    shim.poll_once();

    let status = lives.request(&mut shim, Kind::Query, &[]).unwrap().status;
    assert_eq!((status.registered, status.told, vm.pins.get()), (1, 1, 1));
}

#[test]
fn nothing_is_done_before_hello() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let peer = RawPeer::connect(&mut shim);
    assert_eq!(reason(peer.request(&mut shim, Kind::Register(Dma::Coherent), &[])), Some(Reason::HelloFirst));
    assert!(peer.closed());
    assert_eq!(vm.pins.get(), 0);
}

#[test]
fn malformed_messages_end_their_own_connection_only() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let good = RawPeer::greeted(&mut shim);
    let request = Request { serial: 1, kind: Kind::Query }.to_bytes();
    let long: Vec<u8> = request.iter().copied().chain([0]).collect();
    for bytes in [&request[..31], &long, b"GET / HTTP/1.0\r\n\r\n", &[0; 4096]] {
        let bad = RawPeer::greeted(&mut shim);
        assert!(bad.send(bytes, &[]));
        shim.poll_once();
        assert_eq!(reason(bad.receive()), Some(Reason::Malformed));
        assert!(bad.closed());
    }
    assert!(good.request(&mut shim, Kind::Query, &[]).is_some());
}

#[test]
fn unexpected_descriptors_are_closed_and_end_the_connection() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let cases = [(Kind::Query, 1), (Kind::Register(Dma::Coherent), 1), (Kind::Register(Dma::NonCoherent), 3)];
    for (kind, count) in cases {
        let bad = RawPeer::greeted(&mut shim);
        let files = vec![writer.as_fd(); count];
        assert_eq!(reason(bad.request(&mut shim, kind, &files)), Some(Reason::Malformed), "{kind:?}");
        assert!(bad.closed());
    }
    drop(writer);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0), "no writer is left open");
    assert_eq!(vm.pins.get(), 0);
}

#[test]
fn another_version_gets_a_version_refusal() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let peer = RawPeer::connect(&mut shim);
    let mut bytes = Request { serial: 1, kind: Kind::Hello }.to_bytes();
    bytes[4] = 2;
    assert!(peer.send(&bytes, &[]));
    shim.poll_once();
    assert_eq!(reason(peer.receive()), Some(Reason::Version));
    assert!(peer.closed());
}

#[test]
fn a_peer_that_floods_is_disconnected_and_others_are_still_served() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let (flood, other) = (RawPeer::greeted(&mut shim), RawPeer::greeted(&mut shim));
    let query = Request { serial: 1, kind: Kind::Query }.to_bytes();
    let mut last = None;
    for _ in 0..1000 {
        if !flood.send(&query, &[]) {
            break;
        }
        shim.poll_once();
        last = flood.receive();
    }
    assert_eq!(reason(last), Some(Reason::RateLimited));
    assert!(flood.closed());
    assert!(other.request(&mut shim, Kind::Query, &[]).is_some());
}

#[test]
fn each_peer_gets_one_request_per_iteration() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let (greedy, modest) = (RawPeer::greeted(&mut shim), RawPeer::greeted(&mut shim));
    let query = Request { serial: 1, kind: Kind::Query }.to_bytes();
    for _ in 0..5 {
        assert!(greedy.send(&query, &[]));
    }
    assert!(modest.send(&query, &[]));
    shim.poll_once();
    assert!(modest.receive().is_some());
    assert!(greedy.receive().is_some() && greedy.receive().is_none());
}

#[test]
fn connections_are_limited_and_one_too_many_gets_the_reason() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let peers: Vec<_> = (0..MAX_PEERS).map(|_| RawPeer::greeted(&mut shim)).collect();
    let late = RawPeer::connect(&mut shim);
    assert_eq!(reason(late.receive()), Some(Reason::LimitReached));
    assert!(late.closed());
    drop(peers);
    shim.poll_once();
    RawPeer::greeted(&mut shim);
}

#[test]
fn a_peer_that_never_sends_hello_is_disconnected() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).expect("up for a minute");
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    shim.service.peers.push(Peer::new(PeerId(1), 1, ours.into(), long_ago));
    shim.poll_once();
    assert!(shim.service.peers.is_empty());
}

#[test]
fn another_user_is_refused_with_the_reason() {
    let vm = FakeVm::default();
    let mut shim = shim(&vm);
    let others = [1, 2].map(|n| Uid::from_raw(rustix::process::geteuid().as_raw() + n));
    shim.service.allowed = others;
    let peer = RawPeer::connect(&mut shim);
    assert_eq!(reason(peer.receive()), Some(Reason::WrongUser));
    assert!(peer.closed());
}

/// One step of an arbitrary peer.
#[derive(Clone, Debug)]
enum Step {
    Connect,
    Close(usize),
    Request(usize, Kind, usize),
    Noise(usize, Vec<u8>, usize),
}

fn steps() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        Just(Kind::Hello),
        Just(Kind::Register(Dma::Coherent)),
        Just(Kind::Register(Dma::NonCoherent)),
        (0_u64..6).prop_map(Kind::Unregister),
        Just(Kind::Query),
    ];
    prop_oneof![
        2 => Just(Step::Connect),
        1 => (0_usize..20).prop_map(Step::Close),
        6 => (0_usize..20, kind, 0_usize..2).prop_map(|(peer, kind, files)| Step::Request(peer, kind, files)),
        1 => (0_usize..20, prop::collection::vec(any::<u8>(), 0..64), 0_usize..3)
            .prop_map(|(peer, bytes, files)| Step::Noise(peer, bytes, files)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    #[test]
    fn whatever_peers_do_pins_match_registrations_and_end_with_the_connections(
        script in prop::collection::vec(steps(), 0..60),
    ) {
        let vm = FakeVm::default();
        let mut shim = shim(&vm);
        let (mut peers, null) = (Vec::new(), null());
        for step in script {
            match step {
                Step::Connect => peers.push(RawPeer::connect(&mut shim)),
                Step::Close(n) if !peers.is_empty() => drop(peers.swap_remove(n % peers.len())),
                Step::Request(n, kind, files) if !peers.is_empty() => {
                    peers[n % peers.len()].send(&Request { serial: 1, kind }.to_bytes(), &vec![null.as_fd(); files]);
                }
                Step::Noise(n, bytes, files) if !peers.is_empty() => {
                    peers[n % peers.len()].send(&bytes, &vec![null.as_fd(); files]);
                }
                _ => {}
            }
            shim.poll_once();
            prop_assert_eq!(vm.pins.get(), u32::from(shim.service.registry.status().registered));
            prop_assert!(shim.service.peers.len() <= MAX_PEERS);
        }
        peers.clear();
        while !shim.service.peers.is_empty() {
            shim.poll_once();
        }
        prop_assert_eq!(vm.pins.get(), 0);
        prop_assert_eq!(shim.service.registry.status().non_coherent(), false);
    }
}
