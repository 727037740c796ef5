//! What the requests of zoned disks write.

use super::{Log, page};
use crate::engine::tests::rig::*;
use crate::engine::tests::zoned::{APPEND, REPORT, options, up};

#[test]
fn an_append_marks_its_sector_and_its_status() {
    let (drive, mut driver) = up(options());
    let log = Log::new();
    drive.engine.set_logging(Some(&log.logging));

    // Eight bytes for the sector, then a page boundary, then the status.
    let (header, reply) = (driver.header(APPEND, 0), DATA + 0x8ff8);
    driver.fill(reply, &[0xff; 16]);
    let append = driver.link(&[(header, 16, 0), (DATA, 4096, 0), (reply, 16, WRITE)]);
    driver.offer(append);
    driver.kick();
    driver.wait(1);

    assert_eq!(driver.bytes(reply + 15, 1), [0]);
    assert_eq!(log.take(), [DATA + 0x8000, DATA + 0x9000]);
}

#[test]
fn a_report_marks_the_zones_that_it_lists() {
    let (drive, mut driver) = up(options());
    let log = Log::new();
    drive.engine.set_logging(Some(&log.logging));

    // 64 bytes and 64 for each of eight zones.
    let report = driver.send(REPORT, 0, &[(DATA + 0xfc0, 0x2000)]);
    driver.wait(1);

    assert_eq!(driver.status(report), 0);
    assert_eq!(log.take(), [page(report.status), DATA, DATA + 0x1000]);
}
