//! The data path on controllers with limits, preferences and misbehaviours.

use std::time::Duration;

use super::nvme::{Drive, soak};
use super::rig::*;
use crate::driver::nvme::Avoid;
use crate::emulated::{AnaState, Medium, Mode, Options, Support, Traits};
use crate::engine::WatchdogOptions;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn drive(traits: Traits, options: Options) -> Drive {
    avoiding(traits, options, Vec::new())
}

fn avoiding(traits: Traits, options: Options, avoid: Vec<Avoid>) -> Drive {
    let options = Options { size: 16 << 20, queues: 1, mode: Mode::Threaded, traits, ..options };
    let engine = crate::engine::Options {
        rings: 4,
        spin: Duration::ZERO,
        drain_timeout: Duration::from_secs(20),
        watch: WatchdogOptions::default(),
        placement: Default::default(),
    };
    Drive::avoiding(options, engine, avoid)
}

/// Sends a request with these ranges of sectors, and returns its status.
fn ranges(driver: &mut SplitDriver, kind: u32, ranges: &[(u64, u32)]) -> u8 {
    let segments: Vec<_> = ranges.iter().map(|&(sector, count)| (sector, count, 0)).collect();
    super::ranges::send(driver, kind, &segments, 16 * segments.len())
}

fn write(driver: &mut SplitDriver, sector: u64, bytes: &[u8]) -> u8 {
    driver.fill(DATA, bytes);
    let sent = driver.send(OUT, sector, &[(DATA, bytes.len() as u32)]);
    driver.wait(1);
    driver.status(sent)
}

fn read(driver: &mut SplitDriver, sector: u64, len: usize) -> (u8, Vec<u8>) {
    driver.fill(DATA, &vec![0xee; len]);
    let sent = driver.send(IN, sector, &[(DATA, len as u32)]);
    driver.wait(1);
    (driver.status(sent), driver.bytes(DATA, len))
}

#[test]
fn no_command_crosses_the_drives_boundary_and_data_is_right() {
    // The controller fails each command that crosses it. A boundary need not be a power of two.
    for (boundary, lba, sgl) in [(8, 512, false), (3, 512, true), (2, 4096, false), (5, 4096, true)] {
        let traits = Traits { io_boundary: boundary, ..Traits::default() };
        let drive = drive(traits, Options { lba, sgl, ..Options::default() });
        let mut driver = drive.driver(0, RingOptions::default());

        soak(&mut driver, lba.into(), 60);

        assert_eq!(drive.engine.statistics().errors, 0, "a boundary of {boundary} blocks of {lba}");
    }
}

#[test]
fn discards_and_zeroes_keep_within_the_drives_limits() {
    let traits = Traits {
        zeroes_limit: 1,
        discard_ranges: 2,
        discard_range_blocks: 64,
        discard_blocks: 100,
        ..Traits::default()
    };
    let drive = drive(traits, Options::default());
    let mut driver = drive.driver(0, RingOptions::default());
    let data = vec![7; 128 << 10];
    assert_eq!(write(&mut driver, 0, &data), 0);

    // 2 ranges of 64 blocks are more than 100 blocks: two commands.
    assert_eq!(ranges(&mut driver, DISCARD, &[(0, 64), (64, 64)]), 0);
    // 200 blocks, 16 in a command.
    assert_eq!(ranges(&mut driver, WRITE_ZEROES, &[(0, 200)]), 0);

    let (status, found) = read(&mut driver, 0, data.len());
    assert_eq!(status, 0);
    assert!(found[..200 * 512].iter().all(|&byte| byte == 0) && found[200 * 512..].iter().all(|&byte| byte == 7));
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.errors, statistics.discards, statistics.write_zeroes), (0, 1, 1));
}

#[test]
fn a_drive_that_refuses_its_own_commands_makes_the_guest_do_without() {
    let traits = Traits { write_zeroes: Support::Broken, deallocate: Support::Broken, ..Traits::default() };
    let drive = drive(traits, Options::default());
    let mut driver = drive.driver(0, RingOptions::default());

    assert_eq!(ranges(&mut driver, WRITE_ZEROES, &[(0, 8)]), 2, "VIRTIO_BLK_S_UNSUPP: the guest writes zeroes");
    assert_eq!(ranges(&mut driver, DISCARD, &[(0, 8)]), 2);
    assert_eq!(write(&mut driver, 0, &[1; 512]), 0);
    assert_eq!(drive.engine.statistics().recoveries, 0);
}

#[test]
fn what_is_to_be_avoided_is_not_offered() {
    for (traits, avoid) in [
        (Traits { write_zeroes: Support::No, deallocate: Support::No, ..Traits::default() }, vec![]),
        (Traits::default(), vec![Avoid::WriteZeroes, Avoid::Discard]),
    ] {
        let drive = avoiding(traits, Options::default(), avoid);
        let geometry = drive.engine.geometry();
        assert_eq!((geometry.discard, geometry.zeroes), (None, None));
    }
}

#[test]
fn a_lost_path_fails_requests_and_a_regained_one_serves_them() {
    let traits = Traits { ana: Some(AnaState::NonOptimized), ..Traits::default() };
    let drive = drive(traits, Options::default());
    let mut driver = drive.driver(0, RingOptions::default());
    assert_eq!(write(&mut driver, 0, &[9; 512]), 0);

    for state in [AnaState::Inaccessible, AnaState::Change, AnaState::PersistentLoss] {
        drive.machine.set_ana(state);
        assert_eq!(read(&mut driver, 0, 512).0, 1, "{state:?}");
        drive.machine.set_ana(AnaState::Optimized);
        assert_eq!(read(&mut driver, 0, 512), (0, vec![9; 512]), "after {state:?}");
    }
    assert_eq!(drive.engine.statistics().recoveries, 0);
}

#[test]
fn queues_that_share_tags_serve_a_ring_deeper_than_the_tags() {
    let traits = Traits { shared_tags: true, ..Traits::default() };
    let drive = avoiding(traits, Options { queue_entries: 64, ..Options::default() }, vec![Avoid::Tags]);
    let mut driver = drive.driver(0, RingOptions { size: 128, event_idx: true, base: 0 });

    for _ in 0..20 {
        for n in 0..40 {
            driver.request(IN, 8 * n, &[(DATA + 4096 * n, 4096)]);
        }
        driver.kick();
        assert!(driver.wait(40).iter().all(|&(_, len)| len == 4097));
    }
    assert_eq!(drive.engine.statistics().errors, 0);
}

#[test]
fn blocks_beyond_2_to_the_32nd_are_not_those_below() {
    const FAR: u64 = 1 << 32;
    let file = rustix::fs::memfd_create("medium", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, (FAR + 1024) * 512).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)).into();
    let medium = Medium::File { path, create: false, sparse: true };
    let options = Options { size: 0, queues: 1, mode: Mode::Threaded, medium, ..Options::default() };
    let engine = crate::engine::Options {
        rings: 4,
        spin: Duration::ZERO,
        drain_timeout: Duration::from_secs(20),
        watch: WatchdogOptions::default(),
        placement: Default::default(),
    };
    let drive = Drive::with(options, engine, LEN);
    let mut driver = drive.driver(0, RingOptions::default());

    for (sector, byte) in [(3, 1), (FAR - 1, 2), (FAR, 3), (FAR + 3, 4), (FAR + 1023, 5)] {
        assert_eq!(write(&mut driver, sector, &[byte; 512]), 0);
    }
    // A transfer across the edge, and ranges on both sides of it.
    assert_eq!(read(&mut driver, FAR - 1, 1024), (0, [[2; 512], [3; 512]].concat()));
    assert_eq!(ranges(&mut driver, DISCARD, &[(FAR - 1, 2)]), 0);
    assert_eq!(ranges(&mut driver, WRITE_ZEROES, &[(FAR + 3, 1)]), 0);

    for (sector, byte) in [(3, 1), (FAR - 1, 0), (FAR, 0), (FAR + 3, 0), (FAR + 1023, 5)] {
        assert_eq!(read(&mut driver, sector, 512), (0, vec![byte; 512]), "sector {sector}");
    }
    assert_eq!(read(&mut driver, FAR + 1024, 512).0, 1, "past the end");
    assert_eq!(drive.engine.geometry().blocks, FAR + 1024);
}

#[test]
fn the_smallest_queue_serves_one_command_at_a_time() {
    let drive = drive(Traits::default(), Options { queue_entries: 2, ..Options::default() });
    let mut driver = drive.driver(0, RingOptions::default());

    soak(&mut driver, 512, 30);

    assert_eq!(drive.engine.statistics().errors, 0);
}

#[test]
fn a_namespace_with_metadata_is_served_without_them() {
    for (metadata, lba, sgl) in [(8, 512, false), (64, 4096, true)] {
        let traits = Traits { metadata, ..Traits::default() };
        let drive = drive(traits, Options { lba, sgl, mdts: 0, ..Options::default() });
        let mut driver = drive.driver(0, RingOptions::default());

        soak(&mut driver, lba.into(), 40);
        // The longest transfer: its metadata fill their buffers.
        let data = vec![3; 1 << 20];
        assert_eq!(write(&mut driver, 0, &data), 0);
        assert_eq!(read(&mut driver, 0, data.len()), (0, data));

        assert_eq!(drive.engine.statistics().errors, 0);
        assert_eq!(drive.machine.iommu().faults().len(), 0);
    }
}
