//! A guest that puts into its rings what no driver should: the request ends with an error that its driver can see, or the
//! ring is given up and says so, and the next request, or the next guest, is served as if nothing had happened.

use testbed::client::{Client, Done, Part, Request, Shape};

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
    spoil: fn(&mut Vec<Part>),
    /// Status and bytes written, as the driver finds them.
    found: (u8, u32),
}

const fn wrong(what: &'static str, kind: u32, found: (u8, u32), spoil: fn(&mut Vec<Part>)) -> Wrong {
    Wrong { what, kind, sector: 0, spoil, found }
}

const CHAINS: [Wrong; 16] = [
    wrong("data outside memory", READ, (IOERR, 1), |chain| chain[1].addr = NOWHERE),
    wrong("data outside memory, written", WRITE, (IOERR, 1), |chain| chain[1].addr = NOWHERE),
    wrong("data at the end of the address space", READ, (IOERR, 1), |chain| chain[1].addr = u64::MAX - 511),
    wrong("data past the end of the address space", READ, (IOERR, 1), |chain| chain[1].addr = u64::MAX - 10),
    wrong("more data than there is memory", READ, (IOERR, 1), |chain| chain[1].len = !511),
    wrong("data of no whole block", READ, (IOERR, 1), |chain| chain[1].len = 100),
    wrong("data of the wrong direction", READ, (IOERR, 1), |chain| chain[1].flags = 0),
    wrong("a header outside memory", READ, (IOERR, 1), |chain| chain[0].addr = NOWHERE),
    wrong("a header of 15 bytes", READ, (IOERR, 1), |chain| chain[0].len = 15),
    wrong("no header", READ, (IOERR, 1), |chain| *chain = chain.split_off(1)),
    wrong("readable after writable", READ, (IOERR, 1), |chain| chain.swap(0, 1)),
    wrong("a status outside memory", READ, (NONE, 0), |chain| chain[2].addr = NOWHERE),
    wrong("no status", WRITE, (NONE, 0), |chain| chain.truncate(2)),
    wrong("a status that cannot be written", WRITE, (NONE, 0), |chain| chain[2].flags = 0),
    wrong("a table in the chain", READ, (NONE, 0), |chain| chain[1].flags = Part::TABLE),
    wrong("a type that does not exist", 77, (UNSUPP, 1), |_| {}),
];

fn serve() -> Process {
    Process::serve("size=1M")
}

fn wait(client: &mut Client) -> Done {
    client.rings[0].publish();
    client.rings[0].wait(LIMIT).unwrap().expect("a request ends in bounded time")
}

fn still_serves(client: &mut Client) {
    client.write(5, &[0x5a; 512]).unwrap();
    let mut found = [0; 512];
    client.read(5, &mut found).unwrap();
    assert_eq!(found, [0x5a; 512]);
}

#[test]
fn a_chain_that_is_wrong_fails_by_itself_on_every_kind_of_ring() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        let past_the_end = Wrong { sector: 2048, ..wrong("past the end", READ, (IOERR, 1), |_| {}) };
        for Wrong { what, kind, sector, spoil, found } in CHAINS.iter().chain([&past_the_end]) {
            let ring = &mut client.rings[0];
            let slot = ring.prepare(*kind, *sector);
            let mut chain = ring.parts(slot, 512, if *kind == WRITE { 0 } else { Part::WRITABLE }).to_vec();
            spoil(&mut chain);
            ring.offer(slot, &chain);

            let done = wait(&mut client);

            assert_eq!((done.slot, (done.status, done.written)), (slot, *found), "{what}, {shape:?}");
        }
        still_serves(&mut client);
    }
    assert!(!process.log().contains("panicked"), "{}", process.log());
}

#[test]
fn a_table_that_is_wrong_fails_by_itself() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        let inside = client.rings[0].parts(0, 512, 0)[1].addr;
        for (addr, len) in [(NOWHERE, 48), (u64::MAX - 7, 48), (inside, 0), (inside, 40), (inside, u32::MAX)] {
            let slot = client.rings[0].prepare(READ, 0);
            client.rings[0].offer_linked(slot, &[Part { addr, len, flags: Part::TABLE }]);

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

        assert!(client.rings[0].break_rules(LIMIT).unwrap(), "{shape:?}: nobody said so");

        let other = &mut client.rings[1];
        other.submit(Request::Read { sector: 0, bytes: 512 });
        other.publish();
        assert_eq!(other.wait(LIMIT).unwrap().expect("the other ring goes on").status, OK, "{shape:?}");
        drop(client);
        still_serves(&mut process.client_of(shape));
    }
}
