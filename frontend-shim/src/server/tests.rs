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

use crate::registry::tests::Fake;
use crate::wire::{Policy, REPLY_BYTES};

/// A service on a socket of its own, and the machine behind it.
struct Shim<'a> {
    service: Service<'a, Fake>,
    path: PathBuf,
}

impl Drop for Shim<'_> {
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

fn shim(machine: &Fake) -> Shim<'_> {
    let path = fresh_path();
    let config = Config { socket: path.clone(), policy: Policy::Dynamic, peer: None, log: |_| () };
    let listener = listener::listen_at(&path, None).unwrap();
    Shim { service: Service::new(listener, &config, machine), path }
}

/// The other end of a connection, without [`crate::Client`]'s good manners.
struct Raw(OwnedFd);

impl Raw {
    fn connect(shim: &mut Shim<'_>) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(&shim.path).unwrap()).unwrap();
        shim.turn();
        Self(socket)
    }

    fn greeted(shim: &mut Shim<'_>) -> Self {
        let raw = Self::connect(shim);
        raw.ask(shim, Kind::Hello, &[]).expect("a reply").outcome.unwrap();
        raw
    }

    /// False if the shim has closed.
    fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(files)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags).is_ok()
    }

    /// A reply that is there, or `None`.
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

    fn ask(&self, shim: &mut Shim<'_>, kind: Kind, files: &[BorrowedFd<'_>]) -> Option<Reply> {
        assert!(self.send(&Request { serial: 7, kind }.to_bytes(), files));
        shim.turn();
        self.receive()
    }
}

impl Shim<'_> {
    fn turn(&mut self) {
        self.service.turn(Some(Duration::ZERO));
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
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let peer = Raw::greeted(&mut shim);

    let registered = peer.ask(&mut shim, Kind::Register(Dma::NonCoherent), &[null().as_fd()]).unwrap();
    assert_eq!(machine.pins.get(), 1);
    assert_eq!((registered.serial, registered.status.registered, registered.status.told), (7, 1, 1));
    let handle = registered.outcome.unwrap();

    machine.started.set(true);
    let asked = peer.ask(&mut shim, Kind::Query, &[]).unwrap();
    assert_eq!((asked.status.started_ms, asked.status.vms), (1, 1));

    let left = peer.ask(&mut shim, Kind::Unregister(handle), &[]).unwrap();
    assert_eq!((left.outcome, left.status.registered, machine.pins.get()), (Ok(handle), 0, 0));
}

#[test]
fn a_connection_that_ends_takes_its_registrations_along_and_no_others() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let (dies, lives) = (Raw::greeted(&mut shim), Raw::greeted(&mut shim));
    for peer in [&dies, &lives] {
        peer.ask(&mut shim, Kind::Register(Dma::NonCoherent), &[null().as_fd()]).unwrap();
    }

    drop(dies);
    shim.turn();

    let status = lives.ask(&mut shim, Kind::Query, &[]).unwrap().status;
    assert_eq!((status.registered, status.told, machine.pins.get()), (1, 1, 1));
}

#[test]
fn nothing_is_done_before_hello() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let peer = Raw::connect(&mut shim);
    assert_eq!(reason(peer.ask(&mut shim, Kind::Register(Dma::Coherent), &[])), Some(Reason::HelloFirst));
    assert!(peer.closed());
    assert_eq!(machine.pins.get(), 0);
}

#[test]
fn messages_that_are_none_end_their_connection_only() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let good = Raw::greeted(&mut shim);
    let request = Request { serial: 1, kind: Kind::Query }.to_bytes();
    let long: Vec<u8> = request.iter().copied().chain([0]).collect();
    for bytes in [&request[..31], &long, b"GET / HTTP/1.0\r\n\r\n", &[0; 4096]] {
        let bad = Raw::greeted(&mut shim);
        assert!(bad.send(bytes, &[]));
        shim.turn();
        assert_eq!(reason(bad.receive()), Some(Reason::Malformed));
        assert!(bad.closed());
    }
    assert!(good.ask(&mut shim, Kind::Query, &[]).is_some());
}

#[test]
fn descriptors_where_none_belong_are_closed_and_end_the_connection() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let cases = [(Kind::Query, 1), (Kind::Register(Dma::Coherent), 1), (Kind::Register(Dma::NonCoherent), 3)];
    for (kind, count) in cases {
        let bad = Raw::greeted(&mut shim);
        let files = vec![writer.as_fd(); count];
        assert_eq!(reason(bad.ask(&mut shim, kind, &files)), Some(Reason::Malformed), "{kind:?}");
        assert!(bad.closed());
    }
    drop(writer);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0), "no writer is left open");
    assert_eq!(machine.pins.get(), 0);
}

#[test]
fn another_version_is_told_ours() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let peer = Raw::connect(&mut shim);
    let mut bytes = Request { serial: 1, kind: Kind::Hello }.to_bytes();
    bytes[4] = 2;
    assert!(peer.send(&bytes, &[]));
    shim.turn();
    assert_eq!(reason(peer.receive()), Some(Reason::Version));
    assert!(peer.closed());
}

#[test]
fn a_flood_ends_and_others_are_served_meanwhile() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let (flood, other) = (Raw::greeted(&mut shim), Raw::greeted(&mut shim));
    let query = Request { serial: 1, kind: Kind::Query }.to_bytes();
    let mut last = None;
    for _ in 0..1000 {
        if !flood.send(&query, &[]) {
            break;
        }
        shim.turn();
        last = flood.receive();
    }
    assert_eq!(reason(last), Some(Reason::Flood));
    assert!(flood.closed());
    assert!(other.ask(&mut shim, Kind::Query, &[]).is_some());
}

#[test]
fn each_peer_gets_one_request_a_turn() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let (greedy, modest) = (Raw::greeted(&mut shim), Raw::greeted(&mut shim));
    let query = Request { serial: 1, kind: Kind::Query }.to_bytes();
    for _ in 0..5 {
        assert!(greedy.send(&query, &[]));
    }
    assert!(modest.send(&query, &[]));
    shim.turn();
    assert!(modest.receive().is_some());
    assert!(greedy.receive().is_some() && greedy.receive().is_none());
}

#[test]
fn connections_are_bounded_and_one_too_many_is_told_why() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let peers: Vec<_> = (0..PEERS).map(|_| Raw::greeted(&mut shim)).collect();
    let late = Raw::connect(&mut shim);
    assert_eq!(reason(late.receive()), Some(Reason::TooMany));
    assert!(late.closed());
    drop(peers);
    shim.turn();
    Raw::greeted(&mut shim);
}

#[test]
fn a_peer_that_never_says_hello_makes_room() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).expect("up for a minute");
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    shim.service.peers.push(Peer::new(PeerId(1), 1, ours.into(), long_ago));
    shim.turn();
    assert!(shim.service.peers.is_empty());
}

#[test]
fn another_user_is_told_so_and_closed() {
    let machine = Fake::default();
    let mut shim = shim(&machine);
    let others = [1, 2].map(|n| Uid::from_raw(rustix::process::geteuid().as_raw() + n));
    shim.service.allowed = others;
    let peer = Raw::connect(&mut shim);
    assert_eq!(reason(peer.receive()), Some(Reason::Stranger));
    assert!(peer.closed());
}

/// One step of a peer that does as it likes.
#[derive(Clone, Debug)]
enum Step {
    Connect,
    Close(usize),
    Ask(usize, Kind, usize),
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
        6 => (0_usize..20, kind, 0_usize..2).prop_map(|(peer, kind, files)| Step::Ask(peer, kind, files)),
        1 => (0_usize..20, prop::collection::vec(any::<u8>(), 0..64), 0_usize..3)
            .prop_map(|(peer, bytes, files)| Step::Noise(peer, bytes, files)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    #[test]
    fn whatever_peers_do_pins_match_registrations_and_nothing_outlives_its_connection(
        script in prop::collection::vec(steps(), 0..60),
    ) {
        let machine = Fake::default();
        let mut shim = shim(&machine);
        let (mut peers, null) = (Vec::new(), null());
        for step in script {
            match step {
                Step::Connect => peers.push(Raw::connect(&mut shim)),
                Step::Close(n) if !peers.is_empty() => drop(peers.swap_remove(n % peers.len())),
                Step::Ask(n, kind, files) if !peers.is_empty() => {
                    peers[n % peers.len()].send(&Request { serial: 1, kind }.to_bytes(), &vec![null.as_fd(); files]);
                }
                Step::Noise(n, bytes, files) if !peers.is_empty() => {
                    peers[n % peers.len()].send(&bytes, &vec![null.as_fd(); files]);
                }
                _ => {}
            }
            shim.turn();
            prop_assert_eq!(machine.pins.get(), u32::from(shim.service.registry.status().registered));
            prop_assert!(shim.service.peers.len() <= PEERS);
        }
        peers.clear();
        while !shim.service.peers.is_empty() {
            shim.turn();
        }
        prop_assert_eq!(machine.pins.get(), 0);
        prop_assert_eq!(shim.service.registry.status().non_coherent(), false);
    }
}
