//! A guest with invalid rings. An invalid chain fails with an error; a ring that violates the specification is no longer
//! served, which its error eventfd reports. The next request, or the next guest, is served.

use testbed::client::{Buffer, Client, Completion, Request, Shape};

use crate::process::{LIMIT, Process};

const READ: u32 = 0;
const WRITE: u32 = 1;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// The initial value of a status byte.
const NONE: u8 = 0xff;
const UNMAPPED: u64 = 1 << 45;

/// An invalid chain of header, data and status.
struct BadChain {
    name: &'static str,
    kind: u32,
    sector: u64,
    /// Makes a valid chain invalid.
    corrupt: fn(&mut Vec<Buffer>),
    /// Status and written bytes, as the driver finds them.
    expected: (u8, u32),
    /// Part of the log line; empty if there is none, because the request is only unsupported.
    log: &'static str,
}

const fn bad_chain(
    name: &'static str,
    kind: u32,
    expected: (u8, u32),
    log: &'static str,
    corrupt: fn(&mut Vec<Buffer>),
) -> BadChain {
    BadChain { name, kind, sector: 0, corrupt, expected, log }
}

const NOT_GUEST_MEMORY: &str = "which is not guest memory";
const PAST_THE_END: &str = "past the end of the address space";
const NO_HEADER: &str = "no readable header of 16 bytes";
const NO_STATUS: &str = "no writable byte for the status";

const CHAINS: [BadChain; 17] = [
    bad_chain("data outside memory", READ, (IOERR, 1), NOT_GUEST_MEMORY, |chain| chain[1].addr = UNMAPPED),
    bad_chain("data outside memory, written", WRITE, (IOERR, 1), NOT_GUEST_MEMORY, |chain| chain[1].addr = UNMAPPED),
    bad_chain("data at the end of the address space", READ, (IOERR, 1), NOT_GUEST_MEMORY, |chain| {
        chain[1].addr = u64::MAX - 511
    }),
    bad_chain("data past the end of the address space", READ, (IOERR, 1), PAST_THE_END, |chain| {
        chain[1].addr = u64::MAX - 10;
    }),
    bad_chain("more data than there is memory", READ, (IOERR, 1), NOT_GUEST_MEMORY, |chain| chain[1].len = !511),
    bad_chain("data that is not a whole block", READ, (IOERR, 1), "not whole blocks of 512", |chain| {
        chain[1].len = 100
    }),
    bad_chain("data of the wrong direction", READ, (IOERR, 1), "of the wrong direction", |chain| chain[1].flags = 0),
    bad_chain("a header outside memory", READ, (IOERR, 1), NO_HEADER, |chain| chain[0].addr = UNMAPPED),
    bad_chain("a header of 15 bytes", READ, (IOERR, 1), NO_HEADER, |chain| chain[0].len = 15),
    bad_chain("no header", READ, (IOERR, 1), NO_HEADER, |chain| *chain = chain.split_off(1)),
    bad_chain("readable after writable", READ, (IOERR, 1), "a readable buffer after a writable one", |chain| {
        chain.swap(0, 1);
    }),
    bad_chain("a status outside memory", READ, (NONE, 0), NO_STATUS, |chain| chain[2].addr = UNMAPPED),
    bad_chain("no status", WRITE, (NONE, 0), NO_STATUS, |chain| chain.truncate(2)),
    bad_chain("a status that cannot be written", WRITE, (NONE, 0), NO_STATUS, |chain| chain[2].flags = 0),
    bad_chain("a table in the chain", READ, (NONE, 0), "an indirect descriptor", |chain| {
        chain[1].flags = Buffer::TABLE
    }),
    bad_chain("a type that does not exist", 77, (UNSUPP, 1), "", |_| {}),
    BadChain { sector: 2048, ..bad_chain("past the end", READ, (IOERR, 1), "of a disk of 2048 sectors", |_| {}) },
];

fn serve() -> Process {
    Process::serve("size=1M")
}

fn wait(client: &mut Client) -> Completion {
    client.rings[0].publish();
    client.rings[0].wait(LIMIT).unwrap().expect("a request ends in bounded time")
}

fn assert_serves(client: &mut Client) {
    client.write(5, &[0x5a; 512]).unwrap();
    let mut found = [0; 512];
    client.read(5, &mut found).unwrap();
    assert_eq!(found, [0x5a; 512]);
}

/// Offers a chain on ring 0. Returns its status and written bytes.
fn offer(client: &mut Client, BadChain { name, kind, sector, corrupt, .. }: &BadChain) -> (u8, u32) {
    let ring = &mut client.rings[0];
    let slot = ring.prepare(*kind, *sector);
    let mut chain = ring.buffers(slot, 512, if *kind == WRITE { 0 } else { Buffer::WRITABLE }).to_vec();
    corrupt(&mut chain);
    ring.offer(slot, &chain);
    let done = wait(client);
    assert_eq!(done.slot, slot, "{name}");
    (done.status, done.written)
}

#[test]
fn an_invalid_chain_fails_alone_on_every_kind_of_ring() {
    let mut process = serve();
    process.wait_until("the probing connection has ended", |process| process.log().contains("front-end disconnected"));
    let before = process.descriptors_and_mappings();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        for chain in &CHAINS {
            assert_eq!(offer(&mut client, chain), chain.expected, "{}, {shape:?}", chain.name);
        }
        assert_serves(&mut client);
    }
    assert!(!process.log().contains("panicked"), "{}", process.log());
    process.wait_until("everything has been released", |process| process.descriptors_and_mappings() == before);
}

#[test]
fn each_invalid_chain_is_one_line_in_the_log() {
    for chain in &CHAINS {
        let mut process = serve();

        offer(&mut process.client(), chain);

        let log = process.stop().log;
        let lines: Vec<_> = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
        assert_eq!(lines.len(), usize::from(!chain.log.is_empty()), "{}: {log}", chain.name);
        assert!(lines.iter().all(|line| line.contains("virtqueue 0: request refused: ")), "{}: {log}", chain.name);
        assert!(lines.iter().all(|line| line.contains(chain.log)), "{}: {log}", chain.name);
    }
}

#[test]
fn an_invalid_indirect_table_fails_alone() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(shape);
        let inside = client.rings[0].buffers(0, 512, 0)[1].addr;
        for (addr, len) in [(UNMAPPED, 48), (u64::MAX - 7, 48), (inside, 0), (inside, 40), (inside, u32::MAX)] {
            let slot = client.rings[0].prepare(READ, 0);
            client.rings[0].offer_linked(slot, &[Buffer { addr, len, flags: Buffer::TABLE }]);

            let done = wait(&mut client);

            assert_eq!((done.slot, done.status, done.written), (slot, NONE, 0), "{len} bytes at {addr:#x}, {shape:?}");
        }
        assert_serves(&mut client);
    }
}

#[test]
fn a_ring_that_violates_the_specification_is_no_longer_served_and_the_next_guest_is() {
    let process = serve();
    for shape in Shape::default().kinds() {
        let mut client = process.client_of(Shape { queues: 2, ..shape });
        assert_serves(&mut client);

        assert!(client.rings[0].corrupt_ring(LIMIT).unwrap(), "{shape:?}: no error was signalled");

        let other = &mut client.rings[1];
        other.submit(Request::Read { sector: 0, bytes: 512 });
        other.publish();
        assert_eq!(other.wait(LIMIT).unwrap().expect("the other ring is served").status, OK, "{shape:?}");
        drop(client);
        assert_serves(&mut process.client_of(shape));
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
