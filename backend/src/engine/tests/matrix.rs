//! Every kind of ring with the NVMe driver and the emulated drive: layout × indirect × notification × size. Also many rings of
//! all kinds at once, while they are enabled and disabled in any order.

use std::time::Duration;

use super::nvme::{Drive, Xorshift};
use super::packed_driver::{DISABLE, PackedDriver};
use super::rig::*;
use crate::emulated::{Mode, Options};
use crate::engine::Layout;

/// Guest memory of one ring: the ring and its headers, 64 KiB each, then indirect tables, then data.
const STRIDE: u64 = 0x10_0000;
const TABLES: u64 = 0x2_0000;
const DATA_AT: u64 = 0x8_0000;
const LBA: u64 = 512;
/// Blocks of the drive that belong to one ring.
const BLOCKS: u64 = 64;

/// How the driver is notified.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Calls {
    /// EVENT_IDX negotiated.
    EventIdx,
    /// Flags. Calls are enabled while the used ring is empty.
    Flags,
    /// Never. The driver polls.
    Never,
}

#[derive(Clone, Copy, Debug)]
struct RingKind {
    layout: Layout,
    indirect: bool,
    calls: Calls,
    size: u16,
}

/// A driver of either layout.
enum Driver {
    Split(SplitDriver),
    Packed(PackedDriver),
}

struct GuestDriver {
    kind: RingKind,
    driver: Driver,
    start: u64,
    numbers: Xorshift,
    /// Expected contents of its part of the drive.
    model: Vec<u8>,
    tables: u64,
}

/// A request in flight. `read` has the buffer and the expected data of a read.
struct PendingRequest {
    head: u32,
    status: u64,
    read: Option<(u64, Vec<u8>)>,
    len: u32,
}

impl GuestDriver {
    fn new(drive: &Drive, index: usize, kind: RingKind) -> Self {
        let shape = RingOptions { size: kind.size, event_idx: kind.calls == Calls::EventIdx, base: 0 };
        let start = BASE + STRIDE * index as u64;
        let memory = drive.region.memory().clone();
        let (driver, setup) = SplitDriver::at_addresses(memory, index, shape, (start, start + 0x1_0000));
        let (driver, mut setup) = match kind.layout {
            Layout::Split => (Driver::Split(driver), setup),
            Layout::Packed => {
                let (driver, setup) = PackedDriver::over(driver, setup, shape);
                (Driver::Packed(driver), setup)
            }
        };
        setup.indirect = kind.indirect;
        drive.engine.start_ring(setup).unwrap();
        let numbers = Xorshift(0x1234_5678_9abc + index as u64);
        let mut guest = Self { kind, driver, start, numbers, model: vec![0; (BLOCKS * LBA) as usize], tables: 0 };
        if kind.calls == Calls::Never {
            guest.disable_calls();
        }
        guest
    }

    fn guest(&mut self) -> &mut SplitDriver {
        match &mut self.driver {
            Driver::Split(driver) => driver,
            Driver::Packed(driver) => &mut driver.guest,
        }
    }

    fn disable_calls(&mut self) {
        match &mut self.driver {
            Driver::Split(driver) => driver.set_avail_flags(1),
            Driver::Packed(driver) => driver.set_driver_event(0, DISABLE),
        }
    }

    /// Makes a chain available and kicks if required. Returns its head or buffer ID.
    fn offer(&mut self, parts: &[(u64, u32, u16)]) -> u32 {
        // A table of 64 bytes for each request that can be in flight.
        let table = self.start + TABLES + 64 * self.tables;
        self.tables = (self.tables + 1) % u64::from(self.kind.size);
        let table = self.kind.indirect.then_some(table);
        match &mut self.driver {
            Driver::Split(driver) => {
                let before = driver.avail_idx;
                let head = match table {
                    None => driver.link(parts),
                    Some(table) => {
                        for (n, &(addr, len, flags)) in (0..).zip(parts) {
                            let more = if usize::from(n) + 1 < parts.len() { NEXT } else { 0 };
                            driver.write_desc(table, n, Desc { addr, len, flags: flags | more, next: n + 1 });
                        }
                        driver.raw(Desc { addr: table, len: 16 * parts.len() as u32, flags: INDIRECT, next: 0 })
                    }
                };
                driver.offer(head);
                driver.kick_if_needed(before);
                head.into()
            }
            Driver::Packed(driver) => {
                let before = driver.avail;
                let id = driver.offer_linked(parts, table);
                driver.kick_if_needed(before);
                id.into()
            }
        }
    }

    /// Number of requests of three descriptors that fit the ring.
    fn depth(&self) -> u64 {
        if self.kind.indirect { self.kind.size.into() } else { u64::from(self.kind.size) / 3 }
    }

    /// Makes one random request available.
    fn send_random(&mut self, slot: u64) -> PendingRequest {
        let first = self.numbers.next(BLOCKS);
        let blocks = 1 + self.numbers.next((BLOCKS - first).min(4));
        let (write, len) = (self.numbers.next(2) == 0, blocks * LBA);
        let buffer = self.start + DATA_AT + LBA * slot;
        let on_disk = (first * LBA) as usize..(first * LBA + len) as usize;
        let sector = (self.start - BASE) / STRIDE * BLOCKS + first;
        let seed = self.numbers.next(251) as u8;
        let bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed)).collect();
        let header = self.guest().header(if write { OUT } else { IN }, sector);
        self.guest().fill(buffer, &if write { bytes.clone() } else { vec![0xee; bytes.len()] });
        let data = (buffer, len as u32, if write { 0 } else { WRITE });
        let head = self.offer(&[(header, 16, 0), data, (header + 16, 1, WRITE)]);
        if write {
            self.model[on_disk].copy_from_slice(&bytes);
            return PendingRequest { head, status: header + 16, read: None, len: 1 };
        }
        let read = Some((buffer, self.model[on_disk].to_vec()));
        PendingRequest { head, status: header + 16, read, len: len as u32 + 1 }
    }

    /// Waits for `count` requests, by polling or with the call eventfd.
    fn wait(&mut self, count: usize) -> Vec<(u32, u32)> {
        match (&mut self.driver, self.kind.calls) {
            (Driver::Split(driver), Calls::Never) => driver.wait(count),
            (Driver::Packed(driver), Calls::Never) => driver.wait(count),
            (Driver::Split(driver), _) => driver.wait_for_calls(count),
            (Driver::Packed(driver), _) => driver.wait_for_calls(count),
        }
    }

    /// Sends a batch of independent requests, then checks their completions in any order.
    fn batch(&mut self, depth: u64) {
        // Concurrent requests for one block have no order. So writes are sent one at a time, and larger batches only read.
        let depth = depth.min(self.depth());
        let mut pending = Vec::new();
        if depth == 1 {
            pending.push(self.send_random(0));
        } else {
            for slot in 0..depth {
                pending.push(self.send_read(slot));
            }
        }
        let mut used = self.wait(pending.len());
        assert_eq!(used.len(), pending.len(), "{:?}", self.kind);
        for PendingRequest { head, status, read, len } in pending {
            let place = used.iter().position(|&entry| entry == (head, len));
            used.swap_remove(place.unwrap_or_else(|| panic!("{:?}: {head} not in {used:?}", self.kind)));
            assert_eq!(self.guest().bytes(status, 1), [0], "{:?}", self.kind);
            if let Some((buffer, expected)) = read {
                assert!(self.guest().bytes(buffer, expected.len()) == expected, "{:?}: wrong bytes", self.kind);
            }
        }
    }

    fn send_read(&mut self, slot: u64) -> PendingRequest {
        let first = self.numbers.next(BLOCKS);
        let buffer = self.start + DATA_AT + LBA * slot;
        let sector = (self.start - BASE) / STRIDE * BLOCKS + first;
        let header = self.guest().header(IN, sector);
        let head = self.offer(&[(header, 16, 0), (buffer, LBA as u32, WRITE), (header + 16, 1, WRITE)]);
        let on_disk = (first * LBA) as usize..((first + 1) * LBA) as usize;
        let read = Some((buffer, self.model[on_disk].to_vec()));
        PendingRequest { head, status: header + 16, read, len: LBA as u32 + 1 }
    }
}

fn drive(rings: usize) -> Drive {
    let options = Options { size: 16 << 20, queues: 2, lba: 512, mode: Mode::Threaded, ..Options::default() };
    let (spin, drain_timeout) = (Duration::from_micros(20), Duration::from_secs(20));
    Drive::with(
        options,
        crate::engine::Options {
            rings,
            spin,
            drain_timeout,
            watch: crate::engine::WatchdogOptions::default(),
            placement: Default::default(),
        },
        STRIDE * rings as u64,
    )
}

fn sizes(layout: Layout, indirect: bool) -> impl Iterator<Item = u16> {
    // Without tables, a read takes three descriptors.
    let least = if indirect { 1 } else { 3 };
    let all = [1, 2, 3, 4, 5, 8, 31, 64, 100, 256, 1000, 1023, 1024];
    all.into_iter().filter(move |&size| layout.allows(size) && size >= least)
}

#[test]
fn every_kind_of_ring_transfers_correct_data() {
    for layout in [Layout::Split, Layout::Packed] {
        for indirect in [false, true] {
            for calls in [Calls::EventIdx, Calls::Flags, Calls::Never] {
                let drive = drive(1);
                for size in sizes(layout, indirect) {
                    // The model starts with zeros, but the drive has the data of the previous ring.
                    let mut guest = GuestDriver::new(&drive, 0, RingKind { layout, indirect, calls, size });
                    drive.engine.set_enabled(0, true);
                    guest.zero_all_blocks();
                    for round in 0..12 {
                        guest.batch(1);
                        guest.batch(if round % 4 == 0 { guest.depth() } else { 1 + round % 7 });
                    }
                    drive.engine.stop_ring(0).unwrap();
                }
                assert_eq!(drive.engine.statistics().errors, 0);
            }
        }
    }
}

impl GuestDriver {
    /// Writes zeros to its part of the drive.
    fn zero_all_blocks(&mut self) {
        let sector = (self.start - BASE) / STRIDE * BLOCKS;
        for first in (0..BLOCKS).step_by(4) {
            let header = self.guest().header(OUT, sector + first);
            let buffer = self.start + DATA_AT;
            self.guest().fill(buffer, &[0; 4 * LBA as usize]);
            self.offer(&[(header, 16, 0), (buffer, 4 * LBA as u32, 0), (header + 16, 1, WRITE)]);
            self.wait(1);
        }
    }
}

/// The `n`-th kind of ring.
fn kind(n: usize) -> RingKind {
    let layout = if n.is_multiple_of(2) { Layout::Split } else { Layout::Packed };
    let indirect = (n / 2).is_multiple_of(2);
    let calls = [Calls::EventIdx, Calls::Flags, Calls::Never][n / 4 % 3];
    let sizes: Vec<_> = sizes(layout, indirect).filter(|&size| size <= 256).collect();
    RingKind { layout, indirect, calls, size: sizes[n % sizes.len()] }
}

#[test]
fn sixty_four_rings_are_enabled_and_disabled_in_any_order() {
    let drive = drive(64);
    // One ring in four is never started, as with firmware drivers.
    let mut guests: Vec<_> =
        (0..64).filter(|n| n % 4 != 3).map(|n| (n, GuestDriver::new(&drive, n, kind(n)))).collect();
    let mut numbers = Xorshift(0xfeed_f00d);
    for index in 0..64 {
        drive.engine.set_enabled(index, numbers.next(2) == 0);
    }
    let mut completed = 0;
    for _ in 0..600 {
        let (index, guest) = &mut guests[numbers.next(48) as usize];
        drive.engine.set_enabled(*index, false);
        // Nothing is taken from a disabled ring until it is enabled.
        let pending = guest.send_random(0);
        drive.engine.set_enabled(64 - 1 - (*index - *index % 4), numbers.next(2) == 0); // a ring that is never started
        assert!(guest.has_no_used(), "virtqueue {index}");
        drive.engine.set_enabled(*index, true);
        assert_eq!(guest.wait(1), [(pending.head, pending.len)], "{:?}", guest.kind);
        assert_eq!(guest.guest().bytes(pending.status, 1), [0]);
        guest.batch(3);
        completed += 1;
    }
    assert_eq!(completed, 600);
    for index in 0..64 {
        assert_eq!(drive.engine.stop_ring(index).unwrap().is_some(), index % 4 != 3, "virtqueue {index}");
    }
    assert_eq!(drive.engine.statistics().errors, 0);
}

impl GuestDriver {
    fn has_no_used(&mut self) -> bool {
        match &mut self.driver {
            Driver::Split(driver) => driver.used().is_empty(),
            Driver::Packed(driver) => !driver.sees_used(),
        }
    }
}
