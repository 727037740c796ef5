//! Clients that are slow, loud, silent, many, or ask for what takes its time.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use vmm_sys_util::tempdir::TempDir;

use super::super::Step;
use super::super::listener::LocalAddress;
use super::*;
use crate::socket::Access;

/// Repeats each line. `wait` takes until the test lets it end; `long` is a reply that no socket's buffer holds.
struct Echo(Arc<Mutex<Receiver<()>>>);

impl Dialogue for Echo {
    const MOST_BYTES: usize = 64;

    fn step(&mut self, input: &mut Vec<u8>) -> Step {
        let Some(end) = input.iter().position(|&byte| byte == b'\n') else { return Step::Incomplete };
        let line: Vec<u8> = input.drain(..=end).collect();
        let released = Arc::clone(&self.0);
        match line.as_slice() {
            b"wait\n" => Step::Later(Box::new(move || {
                released.lock().unwrap().recv().unwrap();
                b"waited\n".to_vec()
            })),
            b"long\n" => Step::Reply(vec![b'x'; 4 << 20]),
            b"bye\n" => Step::Last(line),
            _ => Step::Reply(line),
        }
    }
    fn too_long(&self) -> Vec<u8> {
        b"too long\n".to_vec()
    }
    fn busy(&self) -> Vec<u8> {
        b"busy\n".to_vec()
    }
    fn refused(&self, reason: &str) -> Vec<u8> {
        format!("{reason}\n").into_bytes()
    }
}

struct Rig {
    directory: TempDir,
    release: Sender<()>,
    _server: LocalServer,
}

fn rig() -> Rig {
    let directory = TempDir::new().unwrap();
    let address = LocalAddress::Path(directory.as_path().join("socket"));
    let listener = LocalListener::open(&address, &Access::default()).unwrap();
    let (release, released) = channel();
    let echo = Echo(Arc::new(Mutex::new(released)));
    let server = LocalServer::start("test", listener, Admission::OwnUser, echo).unwrap();
    Rig { directory, release, _server: server }
}

impl Rig {
    fn connect(&self) -> BufReader<UnixStream> {
        let socket = UnixStream::connect(self.directory.as_path().join("socket")).unwrap();
        // Only so that a server that hangs fails the test.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        BufReader::new(socket)
    }
}

fn ask(client: &mut BufReader<UnixStream>, line: &str) -> String {
    client.get_mut().write_all(line.as_bytes()).unwrap();
    answer(client)
}

fn answer(client: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    line
}

#[test]
fn requests_that_come_in_pieces_or_in_one_are_all_answered_in_order() {
    let rig = rig();
    let mut client = rig.connect();
    client.get_mut().write_all(b"on").unwrap();
    assert_eq!(ask(&mut client, "e\ntwo\n"), "one\n");
    assert_eq!(answer(&mut client), "two\n");
    let many: String = (0..100).map(|n| format!("{n}\n")).collect();
    client.get_mut().write_all(many.as_bytes()).unwrap();
    (0..100).for_each(|n| assert_eq!(answer(&mut client), format!("{n}\n")));
    assert_eq!(ask(&mut client, "bye\n"), "bye\n");
    assert_eq!(answer(&mut client), "", "the connection has ended");
}

#[test]
fn a_request_without_an_end_is_refused_and_others_go_on() {
    let rig = rig();
    let (mut loud, mut other) = (rig.connect(), rig.connect());
    assert_eq!(ask(&mut loud, &"x".repeat(64)), "too long\n");
    let mut rest = Vec::new();
    assert_eq!(loud.read_to_end(&mut rest).unwrap(), 0);
    assert_eq!(ask(&mut other, "still here\n"), "still here\n");
}

#[test]
fn a_client_that_does_not_read_delays_nobody() {
    let rig = rig();
    let (mut lazy, mut other) = (rig.connect(), rig.connect());
    lazy.get_mut().write_all(b"long\nafter\n").unwrap();
    assert_eq!(ask(&mut other, "quick\n"), "quick\n");
    let mut long = vec![0; 4 << 20];
    lazy.read_exact(&mut long).unwrap();
    assert_eq!(answer(&mut lazy), "after\n");
}

#[test]
fn one_client_too_many_is_told_and_there_is_room_again_when_another_leaves() {
    let rig = rig();
    let mut clients: Vec<_> = (0..MOST_CLIENTS).map(|_| rig.connect()).collect();
    clients.iter_mut().for_each(|client| assert_eq!(ask(client, "here\n"), "here\n"));

    assert_eq!(answer(&mut rig.connect()), "16 clients are connected already\n");

    drop(clients.pop());
    // The server may not have noticed yet.
    let served = |_: &i32| {
        let mut next = rig.connect();
        next.get_mut().write_all(b"room\n").is_ok() && answer(&mut next) == "room\n"
    };
    assert!((0..1000).any(|attempt| served(&attempt)));
}

#[test]
fn one_long_request_runs_at_a_time_and_short_ones_meanwhile() {
    let rig = rig();
    let (mut first, mut second) = (rig.connect(), rig.connect());
    // Both are handled in one turn, so the job has been started before another client is heard.
    assert_eq!(ask(&mut first, "first\nwait\n"), "first\n");
    assert_eq!(ask(&mut second, "wait\n"), "busy\n");
    assert_eq!(ask(&mut second, "short\n"), "short\n");

    rig.release.send(()).unwrap();

    assert_eq!(answer(&mut first), "waited\n");
}

#[test]
fn the_reply_of_a_client_that_has_left_reaches_nobody_else() {
    let rig = rig();
    let mut first = rig.connect();
    first.get_mut().write_all(b"wait\n").unwrap();
    let mut second = rig.connect();
    assert_eq!(ask(&mut second, "here\n"), "here\n");
    drop(first);
    rig.release.send(()).unwrap();
    (0..100).for_each(|n| assert_eq!(ask(&mut second, &format!("{n}\n")), format!("{n}\n")));
}
