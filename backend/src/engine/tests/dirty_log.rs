//! Each page that a request or the ring has written is marked when the driver sees the request's completion, and no other is.

mod order;
mod zones;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::disk::DiskOptions;
use super::nvme::Drive;
use super::packed_driver::PackedDriver;
use super::ranges;
use super::rig::*;
use crate::addr::Gpa;
use crate::driver::Outcome;
use crate::engine::DirtyLogging;
use crate::memory::{DirtyLog, LOG_PAGE};

/// Enough for the region, and for more than one page of log.
const BYTES: u64 = 0x2000;
/// Not guest memory: where the tests have the used ring logged.
const USED_LOG: u64 = 0x0800_0000;

/// A log, as the front-end that owns it sees it.
struct Log {
    file: File,
    logging: DirtyLogging,
}

impl Log {
    fn new() -> Self {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, BYTES).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 0, BYTES).unwrap();
        Self { file, logging: DirtyLogging::new(Arc::new(log), None) }
    }

    /// The addresses of the pages that are marked, and no longer are.
    fn take(&self) -> Vec<u64> {
        let mut bytes = [0; BYTES as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&[0; BYTES as usize], 0).unwrap();
        let marked = |page: &u64| bytes[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..BYTES * 8).filter(marked).map(|page| page * LOG_PAGE).collect()
    }
}

/// A rig whose worker marks pages, and a driver. The ring is not logged unless `used_log` says where.
fn rig(used_log: Option<u64>, options: RingOptions) -> (Rig, Log, SplitDriver) {
    let (rig, log) = (Rig::new(DiskOptions::default()), Log::new());
    let (driver, mut setup) = rig.stopped_driver(0, options);
    setup.used_log = used_log.map(Gpa);
    rig.engine.set_logging(Some(&log.logging));
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    (rig, log, driver)
}

fn page(address: u64) -> u64 {
    address & !(LOG_PAGE - 1)
}

#[test]
fn a_read_marks_its_data_and_its_status() {
    let (_rig, log, mut driver) = rig(None, RingOptions::default());

    let read = driver.send(IN, 0, &[(DATA + 0x1800, 0x1000), (DATA + 0x8000, 0x2000)]);
    driver.wait(1);

    let data = [0x1000, 0x2000, 0x8000, 0x9000].map(|offset| DATA + offset);
    assert_eq!(log.take(), [&[page(read.status)][..], &data].concat());
}

#[test]
fn a_read_of_one_short_command_marks_its_data_and_its_status() {
    let (drive, log) = (Drive::threaded(1, 512), Log::new());
    let mut driver = drive.driver(0, RingOptions::default());
    drive.engine.set_logging(Some(&log.logging));

    let read = driver.send(IN, 0, &[(DATA + 0x1800, 0x1000)]);
    driver.wait(1);

    assert_eq!(log.take(), [page(read.status), DATA + 0x1000, DATA + 0x2000]);
}

#[test]
fn a_bounced_read_marks_its_target() {
    let (rig, log, mut driver) = rig(None, RingOptions::default());

    let read = driver.send(IN, 0, &[(DATA + 0xfff, 1000), (DATA + 0x3001, 24)]);
    driver.wait(1);

    assert_eq!(rig.engine.statistics().bounced, 1);
    assert_eq!(log.take(), [page(read.status), DATA, DATA + 0x1000, DATA + 0x3000]);
}

#[test]
fn a_read_that_fails_is_marked_as_well() {
    let (rig, log, mut driver) = rig(None, RingOptions::default());
    rig.disk.set_outcome(Outcome::Failed);

    let read = driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);

    assert_eq!(driver.status(read), 1);
    assert_eq!(log.take(), [page(read.status), DATA]);
}

#[test]
fn the_identity_string_is_marked_as_far_as_it_reaches() {
    let (_rig, log, mut driver) = rig(None, RingOptions::default());

    let id = driver.send(GET_ID, 0, &[(DATA + 0xff8, 20), (DATA + 0x5000, 100)]);
    driver.wait(1);

    assert_eq!(log.take(), [page(id.status), DATA, DATA + 0x1000]);
}

#[test]
fn requests_that_write_no_memory_mark_only_their_status() {
    let (_rig, log, mut driver) = rig(None, RingOptions::default());

    let write = driver.send(OUT, 0, &[(DATA, 0x2000)]);
    driver.wait(1);
    assert_eq!(log.take(), [page(write.status)]);
    driver.send(FLUSH, 0, &[]);
    driver.wait(1);
    assert_eq!(log.take(), [page(write.status)]);
    for kind in [11, 13] {
        assert_eq!(ranges::send(&mut driver, kind, &[(0, 8, 0)], 16), 0);
        assert_eq!(log.take(), [page(write.status)], "type {kind}");
    }
    // Refused: beyond the end of the disk.
    driver.send(IN, 4096, &[(DATA, 512)]);
    driver.wait(1);
    assert_eq!(log.take(), [page(write.status)]);
}

#[test]
fn a_request_in_flight_when_the_log_comes_is_marked() {
    let (rig, log) = (Rig::new(DiskOptions::default()), Log::new());
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    let read = driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("the command is in flight", || rig.disk.held().len() == 1);

    rig.engine.set_logging(Some(&log.logging));
    rig.disk.resume();
    driver.wait(1);

    assert_eq!(log.take(), [page(read.status), DATA]);
}

#[test]
fn pages_are_marked_in_the_last_log_only() {
    let (rig, first, mut driver) = rig(Some(USED_LOG), RingOptions::default());
    let second = Log::new();

    rig.engine.set_logging(Some(&second.logging));
    first.take();
    driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);
    wait_until("the last mark", || second.take().contains(&USED_LOG));
    rig.engine.set_logging(None);
    second.take();
    driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);
    rig.engine.stop_ring(0).unwrap();

    assert!(first.take().is_empty());
    assert!(second.take().is_empty());
}

#[test]
fn the_used_ring_is_marked_at_its_log_address() {
    // The entries from the fourth on are on another page than the index.
    let used_log = USED_LOG + LOG_PAGE - 4 - 3 * 8;
    let (rig, log, mut driver) = rig(Some(used_log), RingOptions { event_idx: true, ..RingOptions::default() });
    driver.send(FLUSH, 0, &[]);
    driver.wait(1);
    rig.engine.stop_ring(0).unwrap();
    let ring = |pages: Vec<u64>| pages.into_iter().filter(|page| *page >= USED_LOG).collect::<Vec<_>>();
    assert_eq!(ring(log.take()), [USED_LOG, USED_LOG + LOG_PAGE], "all of it at the start, and avail_event at its end");

    let mut setup = driver.setup(1);
    setup.used_log = Some(Gpa(used_log));
    rig.engine.start_ring(setup).unwrap();

    assert_eq!(ring(log.take())[..2], [USED_LOG, USED_LOG + LOG_PAGE], "all of it again");
}

#[test]
fn no_used_entry_is_published_once_the_log_is_truncated() {
    let (rig, log, mut driver) = rig(Some(USED_LOG), RingOptions::default());
    ftruncate(&log.file, 0).unwrap();

    driver.send(IN, 0, &[(DATA, 512)]);

    assert!(wait_readable(&driver.err, std::time::Duration::from_secs(20)), "the ring has not failed");
    assert!(rig.engine.stop_ring(0).unwrap().is_some());
    assert_eq!(driver.used(), []);
}

#[test]
fn the_descriptors_of_a_packed_ring_are_marked_where_they_are() {
    let (rig, log) = (Rig::new(DiskOptions::default()), Log::new());
    let options = RingOptions { size: 512, ..RingOptions::default() };
    let (mut driver, mut setup) = PackedDriver::new(rig.region.memory().clone(), 0, options);
    setup.used_log = Some(Gpa(USED_LOG));
    rig.engine.set_logging(Some(&log.logging));
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    let whole = log.take();
    assert_eq!(whole, [BASE, BASE + LOG_PAGE, USED_LOG]);

    for _ in 0..512 / 2 {
        driver.send(FLUSH, 0, &[]);
        driver.wait(1);
    }
    rig.engine.stop_ring(0).unwrap();

    let found = log.take();
    assert!(found.starts_with(&[BASE, BASE + LOG_PAGE]) && found.ends_with(&[USED_LOG]), "{found:x?}");
}
