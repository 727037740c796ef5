//! Requests wait while the device changes hands, and go on if it does not.

use std::time::Duration;

use super::disk::DiskOptions;
use super::rig::*;
use crate::engine::EngineError;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_request_offered_during_a_hold_is_taken_after_it() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());

    let held = rig.engine.hold(LONG).unwrap();
    driver.send(IN, 0, &[(DATA, 512)]);
    std::thread::sleep(SHORT);
    assert_eq!(driver.used().len(), 0);
    drop(held);

    driver.wait(1);
}

#[test]
fn a_hold_waits_for_the_requests_taken() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("it is taken", || rig.disk.held().len() == 1);

    assert!(rig.engine.hold(SHORT).is_err(), "it does not complete");
    rig.disk.resume();
    let _held = rig.engine.hold(LONG).unwrap();

    assert_eq!(driver.used().len(), 1);
    assert_eq!(rig.disk.recoveries(), 0, "the device is not reset for a hand-over");
}

#[test]
fn after_a_hold_that_failed_requests_are_taken() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("it is taken", || rig.disk.held().len() == 1);
    assert!(rig.engine.hold(SHORT).is_err());

    driver.send(IN, 1, &[(DATA, 512)]);
    wait_until("the next is taken", || rig.disk.held().len() == 2);
    rig.disk.resume();

    driver.wait(2);
}

#[test]
fn a_ring_goes_on_at_its_base_after_the_device_was_stopped_and_started() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);

    let held = rig.engine.hold(LONG).unwrap();
    let base = rig.engine.stop_ring(0).unwrap();
    rig.engine.lend_device().unwrap();
    assert_eq!((rig.disk.quiesced(), rig.disk.recoveries()), (1, 0));
    driver.send(IN, 1, &[(DATA, 512)]);
    rig.engine.take_device_back(|| ());
    assert_eq!(rig.disk.recoveries(), 1, "it is started again");
    rig.engine.start_ring(driver.setup(base.unwrap() as u16)).unwrap();
    drop(held);

    driver.wait(1);
}

#[test]
fn a_device_that_is_away_is_not_handed_over() {
    let rig = Rig::new(DiskOptions::default());
    rig.disk.fail_recovery();

    assert!(rig.engine.lend_device().is_err(), "it does not stop");
    assert!(rig.engine.lend_device().is_err(), "it is down");
    assert!(matches!(rig.engine.hold(LONG), Err(EngineError::Away)), "it is refused without a wait");
    assert_eq!(rig.disk.quiesced(), 0);
}
