//! What an operator sees and asks of a running engine.

use std::time::Duration;

use super::disk::DiskOptions;
use super::nvme::Drive;
use super::rig::*;
use crate::engine::{DeviceState, RingStatistics};

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn each_ring_counts_what_is_completed_and_what_is_in_flight() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let handle = rig.engine.handle();
    let ring = || handle.workers()[0].rings[0];
    (0..3).for_each(|n| {
        driver.send(IN, n, &[(DATA, 512)]);
        driver.wait(1);
    });
    wait_until("they are counted", || ring() == RingStatistics { virtqueue: 0, completed: 3, in_flight: 0 });

    rig.disk.hold();
    driver.send(IN, 3, &[(DATA, 512)]);
    driver.send(IN, 4, &[(DATA, 512)]);
    wait_until("a worker that sleeps has told", || {
        ring() == RingStatistics { virtqueue: 0, completed: 3, in_flight: 2 }
    });

    rig.disk.resume();
    driver.wait(2);
    wait_until("all are counted", || ring() == RingStatistics { virtqueue: 0, completed: 5, in_flight: 0 });
}

#[test]
fn only_requests_that_begin_and_end_while_that_is_measured_are_timed() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let handle = rig.engine.handle();
    let reads = || handle.workers()[0].latencies[0].count();
    rig.disk.hold();
    driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("it is taken", || rig.disk.held().len() == 1);
    handle.measure(true);
    // The worker executes commands in order.
    rig.engine.set_enabled(0, true);
    rig.disk.resume();
    driver.wait(1);
    assert_eq!(reads(), 0, "it began before");

    driver.send(IN, 1, &[(DATA, 512)]);
    driver.wait(1);

    wait_until("it is timed", || reads() == 1);
    assert!(handle.workers()[0].latencies[0].quantile(500).is_some());
}

#[test]
fn a_read_of_one_short_command_is_timed() {
    let drive = Drive::threaded(1, 512);
    let mut driver = drive.driver(0, RingOptions::default());
    let handle = drive.engine.handle();
    handle.measure(true);

    driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);

    wait_until("it is timed", || handle.workers()[0].latencies[0].count() == 1);
}

#[test]
fn requests_are_taken_again_when_the_last_of_two_holds_has_ended() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let drained = rig.engine.handle().hold(LONG).unwrap();
    let handed_over = rig.engine.hold(LONG).unwrap();

    driver.send(IN, 0, &[(DATA, 512)]);
    drop(handed_over);
    // It is executed after whatever the drop has sent, and a pass follows before the next command.
    rig.engine.set_enabled(1, true);
    rig.engine.set_enabled(1, true);
    std::thread::sleep(SHORT);
    assert_eq!(driver.used().len(), 0, "the operator still wants it to wait");
    drop(drained);

    driver.wait(1);
}

#[test]
fn a_device_is_reset_on_request_only_while_it_is_up() {
    let rig = Rig::new(DiskOptions::default());
    let handle = rig.engine.handle();
    assert_eq!(handle.device_state(), DeviceState::Up);
    handle.reset_device().unwrap();
    assert_eq!((rig.disk.recoveries(), handle.statistics().recoveries), (1, 1));

    rig.disk.fail_recovery();
    assert!(handle.reset_device().unwrap_err().to_string().contains("did not come back"));
    assert_eq!(handle.device_state(), DeviceState::Down);
    assert!(handle.reset_device().unwrap_err().to_string().contains("the device is away"));
    assert!(handle.identify().is_err() && handle.health().is_err());
}

#[test]
fn nothing_is_asked_of_a_device_that_has_been_shut_down() {
    let Rig { engine, disk, .. } = Rig::new(DiskOptions::default());
    let handle = engine.handle();

    engine.shut_down();

    assert!(disk.is_shut_down());
    assert_eq!(handle.device_state(), DeviceState::Gone);
    assert!(handle.reset_device().is_err() && handle.hold(LONG).is_err());
    assert_eq!(disk.recoveries(), 0);
}
