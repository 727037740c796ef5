//! Several requests taken, or completed, in one pass.

use std::time::Duration;

use super::disk::DiskOptions;
use super::nvme::{Drive, NVM_READ};
use super::rig::*;
use crate::emulated::{Commands, Effect, Fault, Mode, Options, Status};
use crate::engine::WatchdogOptions;
use crate::engine::data_path::BATCH;

/// A drive with one worker, whose commands complete when its clock is advanced.
fn waiting_drive() -> Drive {
    let options = Options {
        size: 16 << 20,
        queues: 1,
        mode: Mode::Inline,
        latency: Duration::from_micros(10),
        ..Options::default()
    };
    let (spin, drain_timeout, watch) = (Duration::ZERO, Duration::from_secs(20), WatchdogOptions::default());
    Drive::with(
        options,
        crate::engine::Options { rings: 4, spin, drain_timeout, watch, placement: Default::default() },
        LEN,
    )
}

#[test]
fn the_driver_sees_a_batch_while_the_rest_is_still_to_be_taken() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions { size: 256, ..RingOptions::default() });
    let requests = 2 * BATCH + 1;
    for sector in 0..requests {
        driver.request(IN, sector.into(), &[(DATA, 512)]);
    }

    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    driver.wait(requests.into());
    // The worker replies to a command only between two passes.
    rig.engine.set_enabled(0, true);

    let statistics = rig.engine.statistics();
    assert_eq!((statistics.doorbells, statistics.calls), (3, 3));
}

#[test]
fn requests_that_complete_together_are_returned_to_their_own_rings() {
    let drive = waiting_drive();
    let mut drivers = [0, 1].map(|index| drive.driver(index, RingOptions::default()));
    let mut sent = Vec::new();
    for (driver, doorbells) in drivers.iter_mut().zip(1..) {
        sent.push([0, 1, 2].map(|sector| driver.request(IN, sector, &[(DATA, 512)])));
        driver.kick();
        wait_until("the commands", || drive.engine.statistics().doorbells == doorbells);
    }

    drive.machine.advance(Duration::from_secs(1));

    for (driver, sent) in drivers.iter_mut().zip(sent) {
        let heads = sent.map(|sent| (u32::from(sent.head), 513));
        assert_eq!(driver.wait(3), heads);
        assert!(sent.into_iter().all(|sent| driver.status(sent) == 0));
    }
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.reads, statistics.bytes_read), (6, 6 * 512));
}

#[test]
fn one_of_several_requests_that_complete_together_fails_alone() {
    let drive = waiting_drive();
    let mut driver = drive.driver(0, RingOptions::default());
    let reads = Commands { queue: Some(1), opcode: Some(NVM_READ) };
    drive.machine.inject(Fault::once(reads, Effect::Status(Status::LBA_OUT_OF_RANGE)));
    let mut sent = vec![driver.request(OUT, 0, &[(DATA, 512)])];
    sent.extend((1..4).map(|sector| driver.request(IN, sector, &[(DATA, 1024)])));
    driver.kick();
    wait_until("the commands", || drive.engine.statistics().doorbells >= 1);

    drive.machine.advance(Duration::from_secs(1));
    driver.wait(4);

    assert_eq!(sent.into_iter().map(|sent| driver.status(sent)).collect::<Vec<_>>(), [0, 1, 0, 0]);
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.writes, statistics.reads, statistics.errors), (1, 3, 1));
    assert_eq!((statistics.bytes_written, statistics.bytes_read), (512, 2048));
}
