//! Discard and write-zeroes: split to the device's limits, and refused with the status that the specification requires.

use super::disk::DiskOptions;
use super::rig::*;
use crate::driver::{Blocks, Command};

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// Sends a request with a list of (sector, sectors, flags), split into buffers of `cut` bytes. Returns its status.
pub(super) fn send(driver: &mut SplitDriver, kind: u32, segments: &[(u64, u32, u32)], cut: usize) -> u8 {
    let mut list = Vec::new();
    for (sector, sectors, flags) in segments {
        list.extend(sector.to_le_bytes());
        list.extend(sectors.to_le_bytes());
        list.extend(flags.to_le_bytes());
    }
    send_bytes(driver, kind, &list, cut)
}

fn send_bytes(driver: &mut SplitDriver, kind: u32, list: &[u8], cut: usize) -> u8 {
    driver.fill(DATA, list);
    let header = driver.header(kind, 0);
    let mut parts = vec![(header, 16, 0)];
    for at in (0..list.len()).step_by(cut) {
        parts.push((DATA + at as u64, cut.min(list.len() - at) as u32, 0));
    }
    parts.push((header + 16, 1, WRITE));
    let head = driver.link(&parts);
    driver.offer(head);
    driver.kick();
    assert_eq!(driver.wait(1), [(u32::from(head), 1)]);
    driver.status(SentRequest { head, status: header + 16 })
}

fn rig() -> (Rig, SplitDriver) {
    let rig = Rig::new(DiskOptions::default());
    rig.disk.write(0, &[0xaa; 1 << 20]);
    let driver = rig.driver(0, RingOptions::default());
    (rig, driver)
}

#[test]
fn a_discard_is_split_to_the_limits_of_a_command_and_completed_once() {
    let (rig, mut driver) = rig();

    // 4 ranges and 100 blocks fit a command: two commands.
    let status = send(&mut driver, DISCARD, &[(0, 64, 0), (100, 30, 0), (200, 7, 0), (300, 64, 0)], 10);

    assert_eq!(status, 0);
    for (sector, sectors) in [(0, 64), (100, 30), (200, 7), (300, 64)] {
        assert!(rig.disk.read(sector * 512, sectors * 512).iter().all(|&byte| byte == 0xdd));
        assert_eq!(rig.disk.read((sector + sectors) * 512, 1), [0xaa]);
    }
    let statistics = rig.engine.statistics();
    assert_eq!((statistics.discards, statistics.errors, statistics.flushes), (1, 0, 0));
}

#[test]
fn a_long_write_zeroes_is_split_into_commands_and_completed_once() {
    let (rig, mut driver) = rig();
    rig.disk.hold();
    let commands = std::thread::scope(|scope| {
        let sent = scope.spawn(|| send(&mut driver, WRITE_ZEROES, &[(3, 40, UNMAP), (100, 1, UNMAP)], 32));
        wait_until("four commands", || rig.disk.held().len() == 4);
        let held: Vec<_> = rig.disk.held().iter().map(|entry| entry.command).collect();
        rig.disk.resume();
        assert_eq!(sent.join().unwrap(), 0);
        held
    });

    let zeroes = |block, count| Command::WriteZeroes { block, count, deallocate: true };
    assert_eq!(commands, [zeroes(3, 16), zeroes(19, 16), zeroes(35, 8), zeroes(100, 1)]);
    assert!(rig.disk.read(3 * 512, 40 * 512).iter().all(|&byte| byte == 0));
    assert_eq!((rig.disk.read(43 * 512, 1), rig.disk.read(3 * 512 - 1, 1)), (vec![0xaa], vec![0xaa]));
    assert_eq!(rig.engine.statistics().write_zeroes, 1);
}

#[test]
fn one_segment_without_unmap_prevents_deallocation_of_all() {
    let (rig, mut driver) = rig();
    rig.disk.hold();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| send(&mut driver, WRITE_ZEROES, &[(0, 1, UNMAP), (8, 1, 0)], 32));
        wait_until("two commands", || rig.disk.held().len() == 2);
        let not_deallocated = |command| matches!(command, Command::WriteZeroes { deallocate: false, .. });
        assert!(rig.disk.held().iter().all(|entry| not_deallocated(entry.command)));
        rig.disk.resume();
        assert_eq!(sent.join().unwrap(), 0);
    });
}

#[test]
fn empty_segments_need_no_command() {
    let (rig, mut driver) = rig();
    rig.disk.hold();

    assert_eq!(send(&mut driver, DISCARD, &[(5, 0, 0), (6, 0, 0)], 32), 0);
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(2048, 0, UNMAP)], 32), 0);

    assert_eq!(rig.disk.doorbells(), 0);
}

#[test]
fn unknown_flags_are_unsupported() {
    let (rig, mut driver) = rig();
    assert_eq!(send(&mut driver, DISCARD, &[(0, 8, UNMAP)], 16), 2, "UNMAP is reserved in a discard");
    assert_eq!(send(&mut driver, DISCARD, &[(0, 8, 0), (8, 8, 2)], 32), 2);
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(0, 8, 2)], 16), 2);
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(0, 8, u32::MAX)], 16), 2);
    assert_eq!(rig.disk.doorbells(), 0);
}

#[test]
fn segments_outside_the_disk_or_the_limits_fail_without_a_command() {
    let (rig, mut driver) = rig();
    let wrong = [(2047, 2), (2048, 1), (u64::MAX, 1), (u64::MAX - 7, 8), (1 << 63, 8), (0, u32::MAX), (0, 65)];
    for (sector, sectors) in wrong {
        assert_eq!(send(&mut driver, DISCARD, &[(8, 8, 0), (sector, sectors, 0)], 32), 1, "{sector} {sectors}");
    }
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(0, 16 * 16 + 1, 0)], 32), 1);
    assert_eq!(rig.disk.doorbells(), 0);
    assert_eq!(rig.disk.read(8 * 512, 1), [0xaa]);
}

#[test]
fn lists_of_invalid_length_fail() {
    let (rig, mut driver) = rig();
    for len in [0, 1, 15, 17, 5 * 16] {
        assert_eq!(send_bytes(&mut driver, DISCARD, &vec![0; len], 7), 1, "{len}");
    }
    assert_eq!(send_bytes(&mut driver, WRITE_ZEROES, &[0; 17 * 16], 64), 1);
    assert_eq!(send_bytes(&mut driver, WRITE_ZEROES, &vec![0; 0x1_0000], 0x8000), 1);
    assert_eq!(rig.disk.doorbells(), 0);
    assert_eq!(rig.engine.statistics().errors, 7);
}

#[test]
fn a_list_in_a_writable_buffer_fails() {
    let (_rig, mut driver) = rig();
    let sent = driver.send(DISCARD, 0, &[(DATA, 16)]);
    driver.wait(1);
    assert_eq!(driver.status(sent), 1);
}

#[test]
fn sectors_that_are_not_whole_blocks_fail() {
    let mut options = DiskOptions::default();
    (options.geometry.block_size, options.geometry.blocks) = (4096, 256);
    let rig = Rig::new(options);
    let mut driver = rig.driver(0, RingOptions::default());
    assert_eq!(send(&mut driver, DISCARD, &[(1, 8, 0)], 16), 1);
    assert_eq!(send(&mut driver, DISCARD, &[(8, 4, 0)], 16), 1);
    assert_eq!(send(&mut driver, DISCARD, &[(8, 16, 0)], 16), 0);
    assert!(rig.disk.read(4096, 8192).iter().all(|&byte| byte == 0xdd));
}

#[test]
fn discard_and_write_zeroes_are_refused_if_unsupported_or_read_only() {
    let mut options = DiskOptions::default();
    (options.geometry.discard, options.geometry.zeroes) = (None, None);
    let rig = Rig::new(options);
    let mut driver = rig.driver(0, RingOptions::default());
    assert_eq!(send(&mut driver, DISCARD, &[(0, 8, 0)], 16), 2);
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(0, 8, 0)], 16), 2);

    let mut options = DiskOptions::default();
    options.geometry.read_only = true;
    let rig = Rig::new(options);
    let mut driver = rig.driver(0, RingOptions::default());
    assert_eq!(send(&mut driver, DISCARD, &[(0, 8, 0)], 16), 1);
    assert_eq!(send(&mut driver, WRITE_ZEROES, &[(0, 8, UNMAP)], 16), 1);
    assert_eq!(rig.disk.doorbells(), 0);
}

#[test]
fn the_device_gets_the_nonempty_ranges() {
    let (rig, mut driver) = rig();
    rig.disk.hold();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| send(&mut driver, DISCARD, &[(1, 2, 0), (0, 0, 0), (9, 3, 0)], 32));
        wait_until("the command", || rig.disk.held().len() == 1);
        let expected = [Blocks { first: 1, count: 2 }, Blocks { first: 9, count: 3 }];
        assert_eq!(rig.disk.held()[0].ranges, expected);
        rig.disk.resume();
        assert_eq!(sent.join().unwrap(), 0);
    });
}
