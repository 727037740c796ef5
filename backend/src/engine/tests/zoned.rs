//! A zoned drive from the guest's ring to the emulated controller, which enforces the rules of zones.

use std::time::Duration;

use super::nvme::{Drive, NVM_WRITE};
use super::rig::*;
use crate::emulated::{Commands, Effect, Fault, Mode, Options, Order, Status, Traits, ZoneOptions};
use crate::engine::WatchdogOptions;

pub(super) const APPEND: u32 = 15;
pub(super) const REPORT: u32 = 16;
const OPEN: u32 = 18;
const CLOSE: u32 = 20;
pub(super) const FINISH: u32 = 22;
const RESET: u32 = 24;
const RESET_ALL: u32 = 26;

/// VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP and the statuses of zones.
pub(super) const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
pub(super) const INVALID_CMD: u8 = 3;
pub(super) const UNALIGNED_WP: u8 = 4;
const OPEN_RESOURCE: u8 = 5;
const ACTIVE_RESOURCE: u8 = 6;

/// Sectors of a zone, and how many of them can be written.
pub(super) const ZONE: u64 = 2048;
pub(super) const CAPACITY: u64 = 1536;
/// Zone Append (ZNS Command Set 1.1 §3.4.1).
pub(super) const NVM_APPEND: u8 = 0x7d;
/// Where the tests have the reply to a report.
const REPLY: u64 = DATA + 0x18_0000;

pub(super) fn options() -> Options {
    let zones = ZoneOptions { size: ZONE * 512, capacity: CAPACITY * 512, max_open: 3, max_active: 4, append_limit: 3 };
    Options { size: 8 << 20, queues: 1, command_set: Some(2), zones, mode: Mode::Threaded, ..Options::default() }
}

/// A drive whose commands time out after 300 ms.
fn drive(options: Options) -> Drive {
    let watch = WatchdogOptions { timeout: Duration::from_millis(300), retry: Duration::from_millis(10) };
    Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), watch)
}

pub(super) fn up(options: Options) -> (Drive, SplitDriver) {
    let drive = drive(options);
    let driver = drive.driver(0, RingOptions::default());
    (drive, driver)
}

pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i * 7 + i / 512 * 13 + seed * 31) as u8).collect()
}

pub(super) fn write(driver: &mut SplitDriver, sector: u64, bytes: &[u8]) -> u8 {
    driver.fill(DATA, bytes);
    let sent = driver.send(OUT, sector, &[(DATA, bytes.len() as u32)]);
    driver.wait(1);
    driver.status(sent)
}

pub(super) fn read(driver: &mut SplitDriver, sector: u64, len: usize) -> Vec<u8> {
    driver.fill(DATA, &vec![0xee; len]);
    let sent = driver.send(IN, sector, &[(DATA, len as u32)]);
    driver.wait(1);
    assert_eq!(driver.status(sent), 0);
    driver.bytes(DATA, len)
}

/// Makes an append to the zone at `sector` available, with a reply of `reply` bytes.
pub(super) fn offer_append(driver: &mut SplitDriver, sector: u64, data: &[(u64, u32)], reply: u32) -> SentRequest {
    let header = driver.header(APPEND, sector);
    driver.fill(header + 16, &[0xff; 16]);
    let mut parts = vec![(header, 16, 0)];
    parts.extend(data.iter().map(|&(addr, len)| (addr, len, 0)));
    parts.push((header + 16, reply, WRITE));
    let head = driver.link(&parts);
    driver.offer(head);
    SentRequest { head, status: header + 15 + u64::from(reply) }
}

fn fill_parts(driver: &SplitDriver, parts: &[(u64, u32)], bytes: &[u8]) {
    let mut rest = bytes;
    for &(at, len) in parts {
        let (part, more) = rest.split_at(len as usize);
        driver.fill(at, part);
        rest = more;
    }
}

/// The `append_sector` of an append with a reply of `reply` bytes.
fn append_sector(driver: &SplitDriver, sent: SentRequest, reply: u64) -> u64 {
    u64::from_le_bytes(driver.bytes(sent.status + 1 - reply, 8).try_into().unwrap())
}

/// Appends `bytes`. Returns status and sector.
pub(super) fn append(driver: &mut SplitDriver, sector: u64, bytes: &[u8]) -> (u8, u64) {
    driver.fill(DATA, bytes);
    let sent = offer_append(driver, sector, &[(DATA, bytes.len() as u32)], 9);
    driver.kick();
    driver.wait(1);
    (driver.status(sent), append_sector(driver, sent, 9))
}

pub(super) fn manage(driver: &mut SplitDriver, kind: u32, sector: u64) -> u8 {
    let sent = driver.send(kind, sector, &[]);
    driver.wait(1);
    driver.status(sent)
}

/// Start, capacity, write pointer and state of a zone.
type Zone = (u64, u64, u64, u8);

/// A report from `sector` on into `room` bytes: its status, and the zones that it counts.
fn report(driver: &mut SplitDriver, sector: u64, room: u32) -> (u8, Vec<Zone>) {
    driver.fill(REPLY, &vec![0xee; room as usize]);
    let sent = driver.send(REPORT, sector, &[(REPLY, room)]);
    let used = driver.wait(1);
    if driver.status(sent) != 0 {
        return (driver.status(sent), Vec::new());
    }
    let reply = driver.bytes(REPLY, room as usize);
    let word = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
    let count = word(0) as usize;
    assert_eq!(used[0].1 as usize, 64 + 64 * count + 1, "bytes written");
    assert!(reply[8..64].iter().all(|&byte| byte == 0), "reserved");
    let zone = |at: usize| {
        assert_eq!(reply[at + 24], 2, "VIRTIO_BLK_ZT_SWR");
        (word(at + 8), word(at), word(at + 16), reply[at + 25])
    };
    (0, (1..=count).map(|n| zone(64 * n)).collect())
}

/// The write pointer, relative to the zone, and the state of the zone at `sector`.
pub(super) fn zone(driver: &mut SplitDriver, sector: u64) -> (u64, u8) {
    let (status, zones) = report(driver, sector, 128);
    assert_eq!(status, 0);
    (zones[0].2 - zones[0].0, zones[0].3)
}

#[test]
fn a_zone_is_written_at_its_write_pointer_and_nowhere_else() {
    for lba in [512, 4096] {
        let (drive, mut driver) = up(Options { lba, ..options() });
        let data = pattern(1, 64 << 10);

        assert_eq!(write(&mut driver, ZONE, &data), 0);
        assert_eq!(write(&mut driver, ZONE, &data), UNALIGNED_WP, "written already");
        assert_eq!(write(&mut driver, ZONE + 256, &data), UNALIGNED_WP, "ahead");
        assert_eq!(write(&mut driver, ZONE + 128, &data), 0);

        assert_eq!(zone(&mut driver, ZONE), (256, 2), "implicitly open");
        assert!(read(&mut driver, ZONE + 128, data.len()) == data);
        assert_eq!(drive.engine.statistics().writes, 4);
    }
}

#[test]
fn a_write_of_no_whole_blocks_is_not_aligned_to_the_write_pointer() {
    let (_drive, mut driver) = up(Options { lba: 4096, ..options() });
    assert_eq!(write(&mut driver, 0, &[1; 512]), UNALIGNED_WP);
    assert_eq!(append(&mut driver, 0, &[1; 512]).0, UNALIGNED_WP);
    assert_eq!(zone(&mut driver, 0), (0, 1));
}

#[test]
fn a_write_across_the_end_of_a_zone_is_refused_and_nothing_of_it_is_written() {
    let zones = ZoneOptions { size: ZONE * 512, ..ZoneOptions::default() };
    let (_drive, mut driver) = up(Options { zones, ..options() });
    assert_eq!(write(&mut driver, 0, &pattern(1, (ZONE as usize - 8) * 512)), 0);

    assert_eq!(write(&mut driver, ZONE - 8, &[1; 16 * 512]), INVALID_CMD);

    assert_eq!((zone(&mut driver, 0), zone(&mut driver, ZONE)), ((ZONE - 8, 2), (0, 1)));
    assert_eq!(write(&mut driver, ZONE - 8, &[1; 8 * 512]), 0);
    assert_eq!(zone(&mut driver, 0).1, 14, "full");
}

#[test]
fn a_read_across_zones_is_split_there() {
    let zones = ZoneOptions { size: ZONE * 512, ..ZoneOptions::default() };
    for (io_boundary, size) in [(0, ZONE), (64, ZONE), (96, ZONE)] {
        let traits = Traits { io_boundary, ..Traits::default() };
        let (drive, mut driver) = up(Options { zones, traits, ..options() });
        let data = pattern(2, 16 * 512);
        // The whole zone is written in parts that keep within a boundary that the zone is no multiple of.
        if io_boundary != 96 {
            assert_eq!(write(&mut driver, 0, &pattern(1, size as usize * 512)), 0);
            assert_eq!(write(&mut driver, size, &data), 0);
            let found = read(&mut driver, size - 16, 32 * 512);
            assert!(found[16 * 512..] == data);
        }
        assert_eq!(drive.engine.geometry().boundary, if io_boundary == 64 { 64 } else { 2048 });
    }
}

#[test]
fn the_commands_of_a_long_write_are_executed_in_order_on_a_drive_that_has_none() {
    // 128 KiB in a command.
    let order = Order::Random { seed: 3 };
    let (drive, mut driver) = up(Options { latency: Duration::from_micros(200), order, ..options() });
    for (seed, at) in [(1, 0), (2, ZONE), (3, 2 * ZONE)] {
        let data = pattern(seed, 700 << 10);
        assert_eq!(write(&mut driver, at, &data), 0, "write {seed}");
        assert!(read(&mut driver, at, data.len()) == data);
    }
    assert_eq!(drive.machine.traffic().writes, 18, "commands");
    assert_eq!(drive.engine.statistics().errors, 0);
}

#[test]
fn a_long_write_does_not_hold_up_the_requests_behind_it() {
    let (drive, mut driver) = up(Options { latency: Duration::from_millis(20), ..options() });
    driver.fill(DATA, &pattern(1, 700 << 10));

    let long = driver.send(OUT, 0, &[(DATA, 700 << 10)]);
    let short = driver.send(IN, 3 * ZONE, &[(REPLY, 512)]);

    assert_eq!(driver.wait(2).iter().map(|used| used.0).collect::<Vec<_>>(), [short.head, long.head].map(u32::from));
    assert_eq!(drive.engine.statistics().errors, 0);
}

#[test]
fn appends_in_flight_together_each_tell_where_their_data_are() {
    let order = Order::Random { seed: 5 };
    let (drive, mut driver) = up(Options { latency: Duration::from_micros(200), order, ..options() });
    let (len, at) = (12 << 10, |n: u64| DATA + 0x1_0000 * n);
    // Of some, PRPs can describe the first buffer only.
    let cut = |n: u64| if n < 4 { vec![(at(n), len)] } else { vec![(at(n), 4096), (at(n) + 0x8064, len - 4096)] };
    for n in 0..8 {
        fill_parts(&driver, &cut(n), &pattern(n, len as usize));
    }

    // Linux has its status in the last of 16 bytes, the specification in the last of 9.
    let sent: Vec<_> = (0..8).map(|n| offer_append(&mut driver, ZONE, &cut(n), if n < 4 { 9 } else { 16 })).collect();
    driver.kick();
    let used = driver.wait(8);

    let mut sectors: Vec<u64> = Vec::new();
    for (n, sent) in sent.into_iter().enumerate() {
        let reply = if n < 4 { 9 } else { 16 };
        assert!(used.contains(&(u32::from(sent.head), reply)), "{used:?}");
        assert_eq!(driver.status(sent), 0);
        let sector = append_sector(&driver, sent, reply.into());
        sectors.push(sector);
        assert!(read(&mut driver, sector, len as usize) == pattern(n as u64, len as usize), "append {n}");
    }
    sectors.sort_unstable();
    assert_eq!(sectors, (0..8).map(|n| ZONE + 24 * n).collect::<Vec<_>>());
    assert_eq!(drive.machine.traffic().others, 8, "one command for each");
    assert_eq!(drive.engine.statistics().bounced, 4);
}

#[test]
fn appends_that_cannot_be_are_refused_with_the_status_for_it() {
    let (_drive, mut driver) = up(options());
    let longest = vec![1; 32 << 10]; // ZASL

    assert_eq!(append(&mut driver, ZONE, &longest), (0, ZONE));
    assert_eq!(append(&mut driver, ZONE, &[longest.clone(), vec![1; 512]].concat()).0, INVALID_CMD, "longer");
    assert_eq!(append(&mut driver, ZONE + 8, &[1; 512]).0, INVALID_CMD, "not at the start of a zone");
    assert_eq!(append(&mut driver, ZONE, &[]).0, INVALID_CMD, "without data");
    assert_eq!(append(&mut driver, 8 * ZONE, &[1; 512]).0, IOERR, "behind the end of the disk");
    let sent = offer_append(&mut driver, ZONE, &[(DATA, 512)], 8);
    driver.kick();
    driver.wait(1);
    assert_eq!(driver.status(sent), IOERR, "no room for the reply");
    assert_eq!(manage(&mut driver, FINISH, ZONE), 0);
    assert_eq!(append(&mut driver, ZONE, &[1; 512]).0, INVALID_CMD, "full");
}

#[test]
fn an_append_is_never_longer_than_what_can_be_bounced() {
    let zones = ZoneOptions { append_limit: 0, ..options().zones };
    let (drive, mut driver) = up(Options { zones, ..options() });
    assert_eq!(drive.engine.geometry().zones.unwrap().max_append, 128 << 10);
    assert_eq!(append(&mut driver, 0, &vec![1; (64 << 10) + 512]).0, INVALID_CMD);
    let odd = [(DATA, 1001), (DATA + 0x1001, (64 << 10) - 1001)];
    fill_parts(&driver, &odd, &pattern(4, 64 << 10));
    let sent = offer_append(&mut driver, 0, &odd, 9);
    driver.kick();
    driver.wait(1);
    assert_eq!((driver.status(sent), append_sector(&driver, sent, 9)), (0, 0));
    assert!(read(&mut driver, 0, 64 << 10) == pattern(4, 64 << 10));
}

#[test]
fn a_report_has_the_zones_that_fit_and_none_fits_in_less_than_128_bytes() {
    let (_drive, mut driver) = up(options());
    assert_eq!(write(&mut driver, ZONE, &[1; 4096]), 0);
    assert_eq!(manage(&mut driver, FINISH, 2 * ZONE), 0);
    let all: Vec<Zone> = (0..8)
        .map(|n| match n {
            1 => (ZONE, CAPACITY, ZONE + 8, 2),
            2 => (2 * ZONE, CAPACITY, 2 * ZONE + CAPACITY, 14),
            n => (n * ZONE, CAPACITY, n * ZONE, 1),
        })
        .collect();

    assert_eq!(report(&mut driver, 0, 64 << 10), (0, all.clone()));
    assert_eq!(report(&mut driver, 0, 64 + 64 * 3 + 63), (0, all[..3].to_vec()));
    assert_eq!(report(&mut driver, ZONE + 9, 128), (0, all[1..2].to_vec()), "from inside a zone");
    assert_eq!(report(&mut driver, 8 * ZONE - 1, 1024), (0, all[7..].to_vec()), "the last one");
    for (sector, room) in [(0, 127), (0, 0), (8 * ZONE, 1024), (u64::MAX, 1024)] {
        assert_eq!(report(&mut driver, sector, room).0, INVALID_CMD, "{sector} {room}");
    }
    // Longer than a bounce buffer and than a transfer: the guest asks for the rest.
    assert_eq!(report(&mut driver, 0, 200 << 10), (0, all));
}

#[test]
fn too_many_open_and_too_many_active_zones_have_statuses_of_their_own() {
    let (_drive, mut driver) = up(options());
    for n in 0..3 {
        assert_eq!(manage(&mut driver, OPEN, n * ZONE), 0);
    }
    assert_eq!(manage(&mut driver, OPEN, 3 * ZONE), OPEN_RESOURCE);
    assert_eq!(write(&mut driver, 3 * ZONE, &[1; 512]), OPEN_RESOURCE);
    assert_eq!(append(&mut driver, 3 * ZONE, &[1; 512]).0, OPEN_RESOURCE);

    assert_eq!(write(&mut driver, 0, &[1; 512]), 0);
    assert_eq!(manage(&mut driver, CLOSE, 0), 0);
    assert_eq!(write(&mut driver, 3 * ZONE, &[1; 512]), 0, "the fourth active zone");
    assert_eq!(write(&mut driver, 4 * ZONE, &[1; 512]), ACTIVE_RESOURCE);

    assert_eq!(manage(&mut driver, RESET, 0), 0);
    assert_eq!(write(&mut driver, 4 * ZONE, &[1; 512]), 0);
    assert_eq!((zone(&mut driver, 3 * ZONE), zone(&mut driver, 4 * ZONE)), ((1, 4), (1, 2)), "the other gave way");
}

#[test]
fn zones_change_their_states_as_the_guest_commands() {
    let (_drive, mut driver) = up(options());
    assert_eq!(write(&mut driver, 0, &[1; 512]), 0);
    assert_eq!(write(&mut driver, ZONE, &pattern(1, CAPACITY as usize * 512)), 0);
    assert_eq!((zone(&mut driver, 0), zone(&mut driver, ZONE)), ((1, 2), (CAPACITY, 14)));
    assert_eq!(write(&mut driver, ZONE + CAPACITY, &[1; 512]), INVALID_CMD, "behind the capacity");

    assert_eq!(manage(&mut driver, OPEN, 0), 0);
    assert_eq!(zone(&mut driver, 0), (1, 3));
    assert_eq!(manage(&mut driver, CLOSE, 0), 0);
    assert_eq!(zone(&mut driver, 0), (1, 4));
    assert_eq!(manage(&mut driver, FINISH, 0), 0);
    assert_eq!(zone(&mut driver, 0).1, 14);
    assert_eq!(manage(&mut driver, RESET, 0), 0);
    assert_eq!(zone(&mut driver, 0), (0, 1));
    assert_eq!(write(&mut driver, 0, &[1; 512]), 0);
    assert_eq!(manage(&mut driver, RESET_ALL, 77), 0, "whichever sector it names");
    assert_eq!((zone(&mut driver, 0), zone(&mut driver, ZONE)), ((0, 1), (0, 1)));

    for (kind, sector) in [(CLOSE, 0), (OPEN, 8), (RESET, 8 * ZONE), (FINISH, u64::MAX), (RESET, ZONE - 1)] {
        assert_eq!(manage(&mut driver, kind, sector), INVALID_CMD, "{kind} at {sector}");
    }
    assert_eq!(manage(&mut driver, 17, 0), UNSUPP);
}

#[test]
fn an_ordinary_disk_supports_no_request_on_zones_and_no_status_of_them() {
    let (drive, mut driver) = up(Options { size: 8 << 20, queues: 1, mode: Mode::Threaded, ..Options::default() });
    for kind in [OPEN, CLOSE, FINISH, RESET, RESET_ALL] {
        assert_eq!(manage(&mut driver, kind, 0), UNSUPP);
    }
    assert_eq!((report(&mut driver, 0, 1024).0, append(&mut driver, 0, &[1; 512]).0), (UNSUPP, UNSUPP));
    let writes = Commands { queue: Some(1), opcode: Some(NVM_WRITE) };
    drive.machine.inject(Fault::once(writes, Effect::Status(Status::new(1, 0xbc))));
    assert_eq!(write(&mut driver, 0, &[1; 512]), IOERR);
}

#[test]
fn reports_and_appends_are_right_on_a_drive_that_bypasses_the_caches() {
    let (drive, mut driver) = up(Options { no_snoop: true, snoop_enforced: false, ..options() });
    for n in 0..4 {
        assert_eq!(append(&mut driver, ZONE, &pattern(n, 8192)), (0, ZONE + 16 * n));
        assert_eq!(zone(&mut driver, ZONE), (16 * (n + 1), 2));
        assert!(read(&mut driver, ZONE + 16 * n, 8192) == pattern(n, 8192));
    }
    assert_eq!(drive.machine.stale_lines(), crate::emulated::StaleLines::default());
}
