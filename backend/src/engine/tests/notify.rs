//! Notifications and their suppression: calls to the driver, kicks from the driver, doorbells to the device.

use std::time::Duration;

use super::disk::DiskOptions;
use super::rig::*;
use crate::engine::Options;

/// Enough to hit the race windows between arming, polling and sleeping on both sides.
const ROUNDS: usize = 2000;

/// Completes `n` held requests one pass at a time.
fn complete_one_by_one(rig: &Rig, driver: &SplitDriver, n: u16) {
    for _ in 0..n {
        let before = driver.used_idx();
        rig.disk.complete(0);
        wait_until("a used entry", || driver.used_idx() == before.wrapping_add(1));
    }
}

/// A rig whose disk holds `n` requests. The worker is awake.
fn rig_with_held_requests(event_idx: bool, n: u64) -> (Rig, SplitDriver) {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions { event_idx, ..RingOptions::default() });
    rig.disk.hold();
    for sector in 0..n {
        driver.request(IN, sector, &[(DATA, 512)]);
    }
    driver.kick();
    wait_until("commands", || rig.disk.held().len() == n as usize);
    (rig, driver)
}

/// Waits until the worker's current pass has ended: it replies to a command only between two passes.
fn wait_for_pass(rig: &Rig) {
    rig.engine.set_enabled(0, true);
}

#[test]
fn a_batch_costs_one_doorbell_one_publication_and_one_call() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    for sector in 0..16 {
        driver.request(IN, sector, &[(DATA, 512)]);
    }
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);

    driver.wait(16);
    wait_for_pass(&rig);

    let statistics = rig.engine.statistics();
    assert_eq!((statistics.doorbells, statistics.calls), (1, 1));
    assert_eq!(rig.disk.doorbells(), 1);
    assert_eq!(count(&driver.call), 1);
}

#[test]
fn no_interrupt_suppresses_calls_while_it_is_set() {
    let (rig, driver) = rig_with_held_requests(false, 4);

    driver.set_avail_flags(1);
    complete_one_by_one(&rig, &driver, 2);
    wait_for_pass(&rig);
    assert_eq!(count(&driver.call), 0);
    driver.set_avail_flags(0);
    complete_one_by_one(&rig, &driver, 2);
    wait_for_pass(&rig);

    assert_eq!(count(&driver.call), 2);
}

#[test]
fn used_event_suppresses_all_calls_but_one() {
    let (rig, driver) = rig_with_held_requests(true, 6);

    // The first publication after a start always calls.
    complete_one_by_one(&rig, &driver, 1);
    wait_for_pass(&rig);
    assert_eq!(count(&driver.call), 1);
    // The call is sent when the entry at used_event is added, here the fourth.
    driver.set_used_event(3);
    for expected in [0, 0, 1, 0, 0] {
        complete_one_by_one(&rig, &driver, 1);
        wait_for_pass(&rig);
        assert_eq!(count(&driver.call), expected);
    }
}

#[test]
fn without_event_idx_a_polling_worker_suppresses_kicks() {
    let rig = Rig::with(
        DiskOptions::default(),
        Options {
            rings: 1,
            spin: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(20),
            watch: crate::engine::WatchdogOptions::default(),
            placement: Default::default(),
        },
    );
    let mut driver = rig.driver(0, RingOptions::default());

    assert_eq!(driver.used_flags(), 1);
    driver.request(IN, 0, &[(DATA, 512)]);
    driver.wait(1);

    assert_eq!(rig.engine.statistics().kicks, 0);
}

#[test]
fn a_sleeping_worker_enables_kicks() {
    for event_idx in [false, true] {
        let rig = Rig::new(DiskOptions::default());
        let mut driver = rig.driver(0, RingOptions { event_idx, base: 7, ..RingOptions::default() });
        driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);

        if event_idx {
            wait_until("avail_event moves on", || driver.avail_event() == 8);
        } else {
            wait_until("kicks are allowed", || driver.used_flags() == 0);
        }
        let before = rig.engine.statistics().kicks;
        wait_until("a kick has woken the worker", || {
            // The worker may be about to turn kicks off for a while, because it has just served a request.
            driver.send(IN, 0, &[(DATA, 512)]);
            driver.wait(1);
            rig.engine.statistics().kicks > before
        });
    }
}

#[test]
fn no_notification_is_lost_with_a_conforming_driver() {
    for event_idx in [false, true] {
        for spin in [Duration::ZERO, Duration::from_micros(5)] {
            let options = Options {
                rings: 1,
                spin,
                drain_timeout: Duration::from_secs(20),
                watch: crate::engine::WatchdogOptions::default(),
                placement: Default::default(),
            };
            let rig = Rig::with(DiskOptions::default(), options);
            let mut driver = rig.driver(0, RingOptions { size: 16, event_idx, base: 0xfff0 });
            for round in 0..ROUNDS {
                let before = driver.avail_idx;
                let batch = 1 + round % 4;
                for _ in 0..batch {
                    driver.request(IN, 0, &[(DATA, 512)]);
                }
                driver.kick_if_needed(before);
                driver.wait_for_calls(batch);
            }
        }
    }
}

#[test]
fn a_completion_wakes_a_sleeping_worker() {
    let (rig, mut driver) = rig_with_held_requests(false, 1);
    std::thread::sleep(Duration::from_millis(20));

    rig.disk.complete(0);

    driver.wait(1);
}

#[test]
fn kicks_without_requests_are_harmless() {
    let (rig, mut driver) = rig_with_held_requests(true, 1);
    for _ in 0..100 {
        driver.kick();
    }
    rig.disk.resume();
    driver.wait(1);
    driver.send(IN, 0, &[(DATA, 512)]);
    driver.wait(1);
}

#[test]
fn a_ring_without_a_kick_eventfd_is_polled() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, mut setup) = rig.stopped_driver(0, RingOptions::default());
    setup.kick = None;
    rig.engine.start_ring(setup).unwrap();
    rig.engine.set_enabled(0, true);
    std::thread::sleep(Duration::from_millis(5));

    driver.request(IN, 0, &[(DATA, 512)]);

    driver.wait(1);
}

#[test]
fn eventfds_can_be_changed_while_the_ring_runs() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let (kick, call) = (event(), event());

    rig.engine.set_kick(0, Some(kick.try_clone().unwrap()));
    rig.engine.set_call(0, Some(call.try_clone().unwrap()));
    driver.request(IN, 0, &[(DATA, 512)]);
    rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
    driver.wait(1);

    assert!(wait_readable(&call, Duration::from_secs(20)));
    assert_eq!(count(&driver.call), 0);
}

#[test]
fn a_ring_that_has_run_calls_when_it_starts_and_at_each_new_call_eventfd() {
    for (base, calls) in [(0, 0), (7, 1)] {
        let rig = Rig::new(DiskOptions::default());
        let driver = rig.driver(0, RingOptions { base, ..RingOptions::default() });
        let call = event();

        rig.engine.set_call(0, Some(call.try_clone().unwrap()));
        wait_for_pass(&rig);

        assert_eq!((count(&driver.call), count(&call)), (calls, calls), "base {base}");
    }
}

#[test]
fn a_full_call_eventfd_does_not_stop_the_worker() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    rustix::io::write(&driver.call, &(u64::MAX - 1).to_ne_bytes()).unwrap();

    for _ in 0..3 {
        driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);
    }
}

#[test]
fn a_kick_descriptor_that_hangs_up_fails_only_its_ring() {
    let rig = Rig::new(DiskOptions::default());
    let driver = rig.driver(0, RingOptions::default());
    let mut other = rig.driver(1, RingOptions::default());
    let (reader, writer) = rustix::pipe::pipe().unwrap();

    rig.engine.set_kick(0, Some(reader));
    drop(writer);

    assert!(wait_readable(&driver.err, Duration::from_secs(20)));
    other.send(IN, 0, &[(DATA, 512)]);
    other.wait(1);
}
