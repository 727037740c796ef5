//! A guest that puts into its rings what no driver should: the request ends with an error that its driver can see, or the
//! ring is given up and says so, and the next request, or the next guest, is served as if nothing had happened.

use testbed::client::{Buffer, Client, Completion, Request, Shape};

use crate::process::{LIMIT, Process};

const READ: u32 = 0;
const WRITE: u32 = 1;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status byte holds that nobody has written.
const NONE: u8 = 0xff;
const NOWHERE: u64 = 1 << 45;

/// What is wrong with a chain of header, data and status.
struct Wrong {
    what: &'static str,
    kind: u32,
    sector: u64,
    spoil: fn(&mut Vec<Buffer>),
    /// Status and bytes written, as the driver finds them.
    found: (u8, u32),
    /// What the log says of it; nothing of what is no mistake.
    said: &'static str,
}

const fn wrong(
    what: &'static str,
    kind: u32,
    found: (u8, u32),
    said: &'static str,
    spoil: fn(&mut Vec<Buffer>),
) -> Wrong {
    Wrong { what, kind, sector: 0, spoil, found, said }
}

const ELSEWHERE: &str = "which is not guest memory";
const PAST_THE_TOP: &str = "past the end of the address space";
const NO_HEADER: &str = "no readable header of 16 bytes";
const NO_STATUS: &str = "no writable byte for the status";

const CHAINS: [Wrong; 17] = [
    wrong("data outside memory", READ, (IOERR, 1), ELSEWHERE, |chain| chain[1].addr = NOWHERE),
    wrong("data outside memory, written", WRITE, (IOERR, 1), ELSEWHERE, |chain| chain[1].addr = NOWHERE),
    wrong("data at the end of the address space", READ, (IOERR, 1), ELSEWHERE, |chain| chain[1].addr = u64::MAX - 511),
    wrong("data past the end of the address space", READ, (IOERR, 1), PAST_THE_TOP, |chain| {
        chain[1].addr = u64::MAX - 10;
    }),
    wrong("more data than there is memory", READ, (IOERR, 1), ELSEWHERE, |chain| chain[1].len = !511),
    wrong("data of no whole block", READ, (IOERR, 1), "not whole blocks of 512", |chain| chain[1].len = 100),
    wrong("data of the wrong direction", READ, (IOERR, 1), "of the wrong direction", |chain| chain[1].flags = 0),
    wrong("a header outside memory", READ, (IOERR, 1), NO_HEADER, |chain| chain[0].addr = NOWHERE),
    wrong("a header of 15 bytes", READ, (IOERR, 1), NO_HEADER, |chain| chain[0].len = 15),
    wrong("no header", READ, (IOERR, 1), NO_HEADER, |chain| *chain = chain.split_off(1)),
    wrong("readable after writable", READ, (IOERR, 1), "a readable buffer after a writable one", |chain| {
        chain.swap(0, 1);
    }),
    wrong("a status outside memory", READ, (NONE, 0), NO_STATUS, |chain| chain[2].addr = NOWHERE),
    wrong("no status", WRITE, (NONE, 0), NO_STATUS, |chain| chain.truncate(2)),
    wrong("a status that cannot be written", WRITE, (NONE, 0), NO_STATUS, |chain| chain[2].flags = 0),
    wrong("a table in the chain", READ, (NONE, 0), "an indirect descriptor", |chain| chain[1].flags = Buffer::TABLE),
    wrong("a type that does not exist", 77, (UNSUPP, 1), "", |_| {}),
    Wrong { sector: 2048, ..wrong("past the end", READ, (IOERR, 1), "of a disk of 2048 sectors", |_| {}) },
];

fn serve() -> Process {
    Process::serve("size=1M")
}

fn wait(client: &mut Client) -> Completion {
    client.rings[0].publish();
    client.rings[0].wait(LIMIT).unwrap().expect("a request ends in bounded time")
}

fn still_serves(client: &mut Client) {
    client.write(5, &[0x5a; 512]).unwrap();
    let mut found = [0; 512];
    client.read(5, &mut found).unwrap();
    assert_eq!(found, [0x5a; 512]);
}

/// Offers `wrong` on ring 0; how it ends.
fn offer(client: &mut Client, Wrong { what, kind, sector, spoil, .. }: &Wrong) -> (u8, u32) {
    let ring = &mut client.rings[0];
    let slot = ring.prepare(*kind, *sector);
    let mut chain = ring.buffers(slot, 512, if *kind == WRITE { 0 } else { Buffer::WRITABLE }).to_vec();
    spoil(&mut chain);
    ring.offer(slot, &chain);
    let done = wait(client);
    assert_eq!(done.slot, slot, "{what}");
    (done.status, done.written)
}

#[test]
fn a_chain_that_is_wrong_fails_by_itself_on_every_kind_of_ring() {
    let mut process = serve();
    process.wait_until("the door is free", |process| process.log().contains("front-end disconnected"));
    let before = process.holdings();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        for wrong in &CHAINS {
            assert_eq!(offer(&mut client, wrong), wrong.found, "{}, {shape:?}", wrong.what);
        }
        still_serves(&mut client);
    }
    assert!(!process.log().contains("panicked"), "{}", process.log());
    process.wait_until("everything has been given back", |process| process.holdings() == before);
}

#[test]
fn each_mistake_in_a_chain_is_one_line_in_the_log() {
    for wrong in &CHAINS {
        let mut process = serve();

        offer(&mut process.client(), wrong);

        let log = process.stop().log;
        let lines: Vec<_> = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
        assert_eq!(lines.len(), usize::from(!wrong.said.is_empty()), "{}: {log}", wrong.what);
        assert!(lines.iter().all(|line| line.contains("virtqueue 0: request refused: ")), "{}: {log}", wrong.what);
        assert!(lines.iter().all(|line| line.contains(wrong.said)), "{}: {log}", wrong.what);
    }
}

#[test]
fn a_table_that_is_wrong_fails_by_itself() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        let inside = client.rings[0].buffers(0, 512, 0)[1].addr;
        for (addr, len) in [(NOWHERE, 48), (u64::MAX - 7, 48), (inside, 0), (inside, 40), (inside, u32::MAX)] {
            let slot = client.rings[0].prepare(READ, 0);
            client.rings[0].offer_linked(slot, &[Buffer { addr, len, flags: Buffer::TABLE }]);

            let done = wait(&mut client);

            assert_eq!((done.slot, done.status, done.written), (slot, NONE, 0), "{len} bytes at {addr:#x}, {shape:?}");
        }
        still_serves(&mut client);
    }
}

#[test]
fn a_ring_whose_rules_are_broken_is_given_up_and_the_next_guest_is_served() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(Shape { queues: 2, ..shape });
        still_serves(&mut client);

        assert!(client.rings[0].corrupt_ring(LIMIT).unwrap(), "{shape:?}: nobody said so");

        let other = &mut client.rings[1];
        other.submit(Request::Read { sector: 0, bytes: 512 });
        other.publish();
        assert_eq!(other.wait(LIMIT).unwrap().expect("the other ring goes on").status, OK, "{shape:?}");
        drop(client);
        still_serves(&mut process.client_of(shape));
    }
}

#[test]
fn a_guest_that_breaks_its_ring_again_and_again_does_not_fill_the_log() {
    let process = serve();
    for _ in 0..100 {
        assert!(process.client().rings[0].corrupt_ring(LIMIT).unwrap());
    }
    let log = process.log();
    let lines = log.lines().filter(|line| line.contains("it is not served until it is restarted")).count();
    assert!((1..60).contains(&lines), "{lines} lines: {log}");
}
