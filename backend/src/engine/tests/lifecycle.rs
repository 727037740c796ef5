//! Starting and stopping rings, adding and removing memory, losing and recovering the device.

use std::sync::Arc;
use std::time::Duration;

use super::disk::DiskOptions;
use super::rig::*;
use crate::addr::{Gpa, Span};
use crate::engine::Options;
use crate::hardware::AddressSpace;
use crate::memory::{MemTable, Region};

/// Start of a second region, not adjacent to the first.
const SECOND: u64 = 0x1000_0000;

/// An engine with a drain time-out of 50 ms.
fn rig_with_short_drain_timeout(disk: DiskOptions) -> Rig {
    let options = Options {
        rings: 4,
        spin: Duration::ZERO,
        drain_timeout: Duration::from_millis(50),
        watch: crate::engine::WatchdogOptions::default(),
        placement: Default::default(),
    };
    Rig::with(disk, options)
}

/// Runs `wait` on a thread, and then `meanwhile`. Asserts that `wait` has not returned before.
fn while_waiting<T: Send>(wait: impl FnOnce() -> T + Send, meanwhile: impl FnOnce()) -> T {
    std::thread::scope(|scope| {
        let waiter = scope.spawn(wait);
        std::thread::sleep(Duration::from_millis(30));
        assert!(!waiter.is_finished(), "returned too early");
        meanwhile();
        waiter.join().unwrap()
    })
}

#[test]
fn stopping_a_ring_that_was_never_started_returns_none() {
    let rig = Rig::new(DiskOptions::default());
    assert_eq!(rig.engine.stop_ring(3).unwrap(), None);
    rig.engine.set_call(3, None);
    rig.engine.set_kick(3, None);
}

#[test]
fn a_stop_waits_for_requests_taken_and_takes_no_more() {
    let rig = Rig::new(DiskOptions { depth: 2, ..DiskOptions::default() });
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.hold();
    for sector in 0..2 {
        driver.request(IN, sector, &[(DATA, 512)]);
    }
    driver.kick();
    wait_until("two commands", || rig.disk.held().len() == 2);

    let base = while_waiting(
        || rig.engine.stop_ring(0).unwrap(),
        || {
            driver.send(IN, 2, &[(DATA, 512)]);
            rig.disk.resume();
        },
    );

    assert_eq!(base, Some(2));
    assert_eq!(driver.used().len(), 2);
    assert_eq!(driver.used_flags(), 0);
}

#[test]
fn a_restarted_ring_continues_at_its_base() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    let base = {
        rig.engine.start_ring(setup).unwrap();
        rig.engine.set_enabled(0, true);
        driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);
        rig.engine.stop_ring(0).unwrap().unwrap()
    };
    driver.request(IN, 1, &[(DATA, 512)]);
    let setup = driver.setup(u16::try_from(base).unwrap());

    rig.engine.start_ring(setup).unwrap();

    driver.wait(1);
}

#[test]
fn no_requests_are_taken_from_a_ring_while_it_is_disabled() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    rig.engine.start_ring(setup).unwrap();
    driver.send(IN, 0, &[(DATA, 512)]);
    let mut other = rig.driver(1, RingOptions::default());
    other.send(IN, 0, &[(DATA, 512)]);
    other.wait(1);
    assert_eq!(driver.used_idx(), 0);

    rig.engine.set_enabled(0, true);
    driver.wait(1);
    rig.engine.set_enabled(0, false);
    driver.send(IN, 0, &[(DATA, 512)]);
    other.send(IN, 0, &[(DATA, 512)]);
    other.wait(1);

    assert_eq!(driver.used_idx(), 1);
}

#[test]
fn two_workers_serve_their_rings_independently() {
    let rig = Rig::new(DiskOptions { queues: 2, ..DiskOptions::default() });
    let mut drivers: Vec<_> = (0..4).map(|n| rig.driver(n, RingOptions::default())).collect();
    rig.disk.hold();

    for driver in &mut drivers {
        driver.send(IN, 0, &[(DATA, 512)]);
    }
    wait_until("four commands", || rig.disk.held().len() == 4);
    let mut queues: Vec<_> = rig.disk.held().iter().map(|entry| entry.queue).collect();
    queues.sort_unstable();

    assert_eq!(queues, [0, 0, 1, 1]);
    rig.disk.resume();
    drivers.iter_mut().for_each(|driver| drop(driver.wait(1)));
}

fn with(table: &MemTable, region: &Arc<Region>) -> Arc<MemTable> {
    let regions = table.regions().iter().chain([region]).cloned();
    Arc::new(MemTable::new(regions.collect()).unwrap())
}

#[test]
fn memory_can_be_added_and_buffers_may_cross_the_boundary_of_regions() {
    let rig = Rig::new(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let boundary = BASE + LEN;
    let next = region(boundary, 0x1_0000);
    let refused = driver.send(IN, 0, &[(boundary - 256, 512)]);
    driver.wait(1);
    assert_eq!(driver.status(refused), 1);

    rig.disk.add(&next).unwrap();
    rig.engine.publish(with(&rig.table, &next));
    rig.disk.write(0, &[0x5a; 1024]);
    let direct = driver.send(IN, 0, &[(boundary - 256, 512)]);
    let bounced = driver.send(IN, 0, &[(boundary - 511, 1024)]);
    driver.wait(2);

    assert_eq!((driver.status(direct), driver.status(bounced)), (0, 0));
    assert_eq!(driver.bytes(boundary - 511, 511), [0x5a; 511]);
    let mut second = [0; 514];
    next.memory().copy_to(0, &mut second);
    assert_eq!(second[..513], [0x5a; 513]);
    assert_eq!(second[513], 0);
}

/// Adds a second region, and holds one request in each region.
fn hold_one_request_per_region(rig: &Rig) -> (SplitDriver, Span<Gpa>, Arc<MemTable>) {
    let second = region(SECOND, 0x1_0000);
    rig.disk.add(&second).unwrap();
    rig.engine.publish(with(&rig.table, &second));
    let mut driver = rig.driver(0, RingOptions::default());
    rig.disk.write(0, &[0xc3; 512]);
    rig.disk.hold();
    driver.request(IN, 0, &[(DATA, 512)]);
    driver.request(IN, 0, &[(SECOND + 1, 512)]); // bounced, so the worker writes the data on completion
    driver.kick();
    wait_until("both commands", || rig.disk.held().len() == 2);
    (driver, second.gpa(), Arc::clone(&rig.table))
}

#[test]
fn removing_memory_waits_only_for_requests_that_use_it() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, second, table) = hold_one_request_per_region(&rig);

    while_waiting(|| rig.engine.remove_memory(table, &[second]).unwrap(), || rig.disk.complete(1));

    assert_eq!(rig.disk.held().len(), 1);
    assert_eq!(driver.wait(1)[0].1, 513);
    let refused = driver.send(IN, 0, &[(SECOND, 512)]);
    driver.wait(1);
    assert_eq!(driver.status(refused), 1);
    rig.disk.resume();
    driver.wait(1);
}

#[test]
fn removing_unused_memory_does_not_wait() {
    let rig = Rig::new(DiskOptions::default());
    let (mut driver, second, table) = hold_one_request_per_region(&rig);
    rig.disk.complete(1);
    driver.wait(1);

    rig.engine.remove_memory(table, &[second]).unwrap();

    assert_eq!(rig.disk.held().len(), 1);
    rig.disk.resume();
    driver.wait(1);
}

#[test]
fn a_ring_in_removed_memory_fails() {
    let rig = Rig::new(DiskOptions::default());
    let driver = rig.driver(0, RingOptions::default());

    rig.engine.remove_memory(Arc::new(MemTable::default()), &[rig.region.gpa()]).unwrap();

    assert_eq!(count(&driver.err), 1);
    assert_eq!(rig.engine.stop_ring(0).unwrap(), Some(0));
}

#[test]
fn a_device_that_loses_commands_is_reset_and_all_rings_continue() {
    let rig = rig_with_short_drain_timeout(DiskOptions { queues: 2, ..DiskOptions::default() });
    let mut drivers: Vec<_> = (0..3).map(|n| rig.driver(n, RingOptions::default())).collect();
    rig.disk.hold();
    let sent: Vec<_> = drivers.iter_mut().map(|driver| driver.send(IN, 0, &[(DATA, 512)])).collect();
    wait_until("three commands", || rig.disk.held().len() == 3);

    assert_eq!(rig.engine.stop_ring(0).unwrap(), Some(1));

    // Every request in flight has failed, on the other rings too.
    for (driver, sent) in drivers.iter_mut().zip(&sent) {
        assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
        assert_eq!(driver.status(*sent), 1);
    }
    rig.disk.resume();
    for driver in &mut drivers[1..] {
        let sent = driver.send(IN, 0, &[(DATA, 512)]);
        driver.wait(1);
        assert_eq!(driver.status(sent), 0);
    }
    assert_eq!(rig.disk.recoveries(), 1);
    assert_eq!(rig.engine.statistics().recoveries, 1);
}

#[test]
fn a_reset_frees_bounce_slots_and_fails_partly_submitted_requests() {
    let rig = rig_with_short_drain_timeout(DiskOptions { depth: 1024, ..DiskOptions::default() });
    let (mut driver, setup) = rig.stopped_driver(0, RingOptions::default());
    rig.disk.hold();
    driver.request(IN, 0, &[(DATA + 1, 0xf_fe00)]);
    driver.request(IN, 0, &[(DATA + 1, 0xf_fe00)]);
    rig.engine.set_enabled(0, true);
    rig.engine.start_ring(setup).unwrap();
    wait_until("all slots in use", || rig.disk.held().len() == 16);

    assert_eq!(rig.engine.stop_ring(0).unwrap(), Some(2));

    assert_eq!(driver.wait(2).iter().map(|&(_, len)| len).collect::<Vec<_>>(), [1, 1]);
    rig.disk.resume();
    rig.engine.start_ring(driver.setup(2)).unwrap();
    let sent = driver.send(IN, 0, &[(DATA + 1, 0xf_fe00)]);
    driver.wait(1);
    assert_eq!(driver.status(sent), 0);
}

#[test]
fn removing_memory_does_not_wait_forever_for_a_lost_command() {
    let rig = rig_with_short_drain_timeout(DiskOptions::default());
    let (mut driver, second, table) = hold_one_request_per_region(&rig);

    rig.engine.remove_memory(table, &[second]).unwrap();

    assert_eq!(driver.wait(2).iter().map(|&(_, len)| len).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(rig.disk.recoveries(), 1);
}

#[test]
fn every_request_fails_at_once_if_recovery_fails() {
    let rig = rig_with_short_drain_timeout(DiskOptions::default());
    let mut driver = rig.driver(0, RingOptions::default());
    let mut other = rig.driver(1, RingOptions::default());
    rig.disk.hold();
    driver.send(IN, 0, &[(DATA, 512)]);
    wait_until("a command", || rig.disk.held().len() == 1);
    rig.disk.fail_recovery();

    rig.engine.stop_ring(0).unwrap();

    assert_eq!(driver.wait(1)[0].1, 1);
    for kind in [IN, OUT, FLUSH] {
        let data = if kind == FLUSH { vec![] } else { vec![(DATA, 512)] };
        let sent = other.send(kind, 0, &data);
        other.wait(1);
        assert_eq!(other.status(sent), 1);
    }
    assert_eq!(rig.engine.stop_ring(1).unwrap(), Some(3));
}

#[test]
fn a_shutdown_completes_all_requests_before_the_device_stops() {
    let rig = Rig::new(DiskOptions { queues: 2, ..DiskOptions::default() });
    let mut drivers: Vec<_> = (0..4).map(|n| rig.driver(n, RingOptions::default())).collect();
    rig.disk.hold();
    for driver in &mut drivers {
        driver.send(OUT, 0, &[(DATA, 512)]);
    }
    wait_until("four commands", || rig.disk.held().len() == 4);
    let disk = rig.disk.clone();

    while_waiting(|| rig.engine.shut_down(), || disk.resume());

    assert!(disk.is_shut_down());
    for driver in &mut drivers {
        assert_eq!(driver.used().len(), 1);
    }
}
