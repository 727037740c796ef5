//! A controller that fails while requests are in flight. The watchdog alone recovers it: no ring is stopped here. Each request
//! ends in bounded time, and the engine continues when the controller does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::nvme::{Drive, NVM_READ, NVM_WRITE, soak};
use super::rig::*;
use crate::emulated::{Commands, Effect, Fault, Mode, Options};
use crate::engine::WatchdogOptions;

const ABORT: u8 = 8;

/// A drive with a command time-out of 200 ms.
fn drive(queues: u16) -> Drive {
    let watch = WatchdogOptions { timeout: Duration::from_millis(200), retry: Duration::from_millis(10) };
    let options = Options { size: 16 << 20, queues, mode: Mode::Threaded, ..Options::default() };
    Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), watch)
}

/// The same. After a release the function can be reacquired while `available`.
fn reacquirable_drive(queues: u16, available: &Arc<AtomicBool>) -> Drive {
    let watch = WatchdogOptions { timeout: Duration::from_millis(200), retry: Duration::from_millis(10) };
    let options = Options { size: 16 << 20, queues, mode: Mode::Threaded, ..Options::default() };
    Drive::reacquirable(options, watch, available)
}

fn opcode(opcode: u8) -> Commands {
    Commands { queue: Some(1), opcode: Some(opcode) }
}

fn read(driver: &mut SplitDriver) -> u8 {
    let sent = driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);
    driver.status(sent)
}

#[test]
fn an_overdue_command_is_aborted_and_no_other_is_affected() {
    let drive = drive(1);
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.inject(Fault::once(opcode(NVM_WRITE), Effect::Delay(Duration::from_secs(3600))));

    let slow = driver.send(OUT, 0, &[(DATA, 512)]);
    let good = driver.send(IN, 8, &[(DATA + 4096, 512)]);
    driver.wait(2);

    assert_eq!((driver.status(slow), driver.status(good)), (1, 0));
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.aborts, statistics.recoveries), (1, 0), "{statistics}");
    assert_eq!(read(&mut driver), 0);
}

#[test]
fn a_lost_command_is_resubmitted_after_a_reset() {
    let drive = drive(2);
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    drivers[0].fill(DATA, &[0x77; 512]);
    drive.machine.inject(Fault::once(opcode(NVM_WRITE), Effect::Lose));

    let lost = drivers[0].send(OUT, 5, &[(DATA, 512)]);
    assert_eq!(drivers[0].wait(1), [(u32::from(lost.head), 1)]);

    assert_eq!(drivers[0].status(lost), 0);
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.recoveries, statistics.resubmitted, statistics.errors), (1, 1, 0), "{statistics}");
    let back = drivers[1].send(IN, 5, &[(DATA + 8192, 512)]);
    drivers[1].wait(1);
    assert_eq!((drivers[1].status(back), drivers[1].bytes(DATA + 8192, 512)), (0, vec![0x77; 512]));
}

#[test]
fn a_command_that_is_lost_twice_fails_and_others_continue() {
    let drive = drive(1);
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.inject(Fault::always(opcode(NVM_WRITE), Effect::Lose));

    let lost = driver.send(OUT, 0, &[(DATA, 512)]);
    driver.wait(1);

    assert_eq!(driver.status(lost), 1);
    assert_eq!(drive.engine.statistics().recoveries, 2);
    assert_eq!(read(&mut driver), 0);
}

#[test]
fn a_controller_that_loses_an_abort_is_reset() {
    let drive = drive(1);
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.inject(Fault::once(opcode(NVM_READ), Effect::Lose));
    drive.machine.inject(Fault::once(Commands::admin(ABORT), Effect::Lose));

    assert_eq!(read(&mut driver), 0);

    assert_eq!(drive.engine.statistics().recoveries, 1);
}

#[test]
fn a_fatal_status_is_detected_long_before_the_timeout() {
    let watch = WatchdogOptions { timeout: Duration::from_secs(3600), ..WatchdogOptions::default() };
    let options = Options { size: 16 << 20, queues: 2, mode: Mode::Threaded, ..Options::default() };
    let drive = Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), watch);
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    drive.machine.inject(Fault::once(opcode(NVM_READ), Effect::Fatal));

    for driver in &mut drivers {
        assert_eq!(read(driver), 0);
    }

    assert_eq!(drive.engine.statistics().recoveries, 1);
}

#[test]
fn requests_fail_at_once_while_a_drive_is_unplugged() {
    let drive = drive(2);
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    for _ in 0..3 {
        drive.machine.inject(Fault::once(opcode(NVM_READ), Effect::Remove));
        for driver in &mut drivers {
            assert_eq!(read(driver), 1);
        }

        drive.machine.clear_faults();

        wait_until("the drive is back", || drivers.iter_mut().all(|driver| read(driver) == 0));
    }
    assert_eq!(drive.machine.iommu().faults().len(), 0);
}

#[test]
fn a_drive_that_the_host_requests_is_released_and_later_reacquired() {
    let back = Arc::new(AtomicBool::new(false));
    let drive = reacquirable_drive(2, &back);
    let function = drive.machine.function();
    let held = Arc::strong_count(&function);
    let mut driver = drive.driver(0, RingOptions::default());
    assert_eq!(read(&mut driver), 0);
    drive.machine.inject(Fault::once(opcode(NVM_WRITE), Effect::Lose));
    let lost = driver.send(OUT, 0, &[(DATA, 512)]);

    drive.machine.request_removal();

    driver.wait(1);
    assert_eq!(driver.status(lost), 1);
    wait_until("the function is released", || Arc::strong_count(&function) == held - 1);
    assert_eq!(read(&mut driver), 1);
    assert!(drive.engine.set_write_cache(false).is_err());
    let mut command = [0; 2];
    function.config_read(4, &mut command).unwrap();
    assert_eq!(command[0] & 4, 0, "bus mastering is off");

    back.store(true, Ordering::Relaxed);

    wait_until("the drive is back", || read(&mut driver) == 0);
    driver.fill(DATA, &[0x3c; 700]);
    for data in [&[(DATA, 512)][..], &[(DATA + 1, 511), (DATA + 700, 1)]] {
        let sent = driver.send(OUT, 9, data);
        driver.wait(1);
        assert_eq!(driver.status(sent), 0, "direct or bounced: {data:?}");
    }
    assert_eq!(drive.machine.iommu().faults().len(), 0);
}

#[test]
fn a_drive_can_be_released_and_reacquired_repeatedly() {
    let back = Arc::new(AtomicBool::new(true));
    let drive = reacquirable_drive(2, &back);
    let mut drivers: Vec<_> = (0..2).map(|n| drive.driver(n, RingOptions::default())).collect();
    for _ in 0..10 {
        back.store(false, Ordering::Relaxed);
        drive.machine.request_removal();
        wait_until("requests fail", || drivers.iter_mut().all(|driver| read(driver) == 1));

        back.store(true, Ordering::Relaxed);
        wait_until("requests are served", || drivers.iter_mut().all(|driver| read(driver) == 0));
    }
    assert_eq!(drive.machine.iommu().faults().len(), 0);
}

#[test]
fn a_different_drive_is_released_again() {
    let back = Arc::new(AtomicBool::new(false));
    let drive = reacquirable_drive(1, &back);
    let function = drive.machine.function();
    let held = Arc::strong_count(&function);
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.request_removal();
    wait_until("requests fail", || read(&mut driver) == 1);
    drive.machine.inject(Fault::Identify { cns: 1, offset: 4, bytes: b"ANOTHER".to_vec() });

    back.store(true, Ordering::Relaxed);

    wait_until("its identity has been read", || drive.machine.traffic().admin > 20);
    assert_eq!(read(&mut driver), 1);
    wait_until("it is released", || Arc::strong_count(&function) == held - 1);
}

#[test]
fn data_survives_a_controller_that_keeps_losing_commands() {
    let drive = drive(2);
    let mut drivers: Vec<_> = (0..4).map(|n| drive.driver(n, RingOptions::default())).collect();
    for n in 1..4 {
        // The requests in flight include bounced and split ones.
        let on = Commands { queue: Some(1), opcode: None };
        drive.machine.inject(Fault::Command { on, skip: 60 * n, times: 1, effect: Effect::Lose });
    }

    std::thread::scope(|scope| {
        for driver in &mut drivers {
            scope.spawn(move || soak(driver, 512, 150));
        }
    });

    let statistics = drive.engine.statistics();
    assert_eq!((statistics.reads + statistics.writes, statistics.errors), (600, 0), "{statistics}");
    assert!(statistics.recoveries != 0 && statistics.resubmitted != 0, "{statistics}");
    assert_eq!(drive.machine.iommu().faults().len(), 0);
}

#[test]
fn a_resize_is_adopted_and_reported_to_the_listener() {
    let drive = drive(2);
    let mut driver = drive.driver(1, RingOptions::default());
    let calls = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&calls);
    drive.engine.on_change(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let mut last_sector = |size: u64| {
        let sent = driver.send(IN, size / 512 - 1, &[(DATA, 512)]);
        driver.wait(1);
        driver.status(sent)
    };
    for (n, size) in [(1, 8 << 20), (2, 12 << 20), (3, 16 << 20)] {
        drive.machine.resize(size).unwrap();

        wait_until("the listener is called", || calls.load(Ordering::Relaxed) == n);
        assert_eq!(drive.engine.geometry().blocks, size / 512);
        assert_eq!((last_sector(size), last_sector(size + 512)), (0, 1));
    }
    assert_eq!(drive.engine.statistics().recoveries, 0);
}

#[test]
fn requests_fail_while_the_namespace_is_another_one() {
    let drive = drive(1);
    let mut driver = drive.driver(0, RingOptions::default());
    assert_eq!(read(&mut driver), 0);
    drive.machine.inject(Fault::Identify { cns: 0, offset: 104, bytes: vec![1; 16] });

    drive.machine.resize(8 << 20).unwrap(); // for its asynchronous event

    wait_until("the change is detected", || read(&mut driver) == 1);
    drive.machine.clear_faults();
    wait_until("the former namespace is served again", || read(&mut driver) == 0);
}

#[test]
fn a_size_that_changes_during_a_reset_is_adopted() {
    let drive = drive(1);
    let mut driver = drive.driver(0, RingOptions::default());
    drive.machine.inject(Fault::Identify { cns: 0, offset: 0, bytes: 1000_u64.to_le_bytes().to_vec() });
    drive.machine.inject(Fault::once(opcode(NVM_READ), Effect::Fatal));

    assert_eq!(read(&mut driver), 0);

    assert_eq!((drive.engine.geometry().blocks, drive.engine.statistics().recoveries), (1000, 1));
    let sent = driver.send(IN, 1000, &[(DATA, 512)]);
    driver.wait(1);
    assert_eq!(driver.status(sent), 1);
}
