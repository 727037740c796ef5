//! A ring stops while the device holds its commands, and goes on with its record.

use std::time::Duration;

use super::crash::{BOTH, Process, inflight, with_four_in_flight};
use super::disk::DiskOptions;
use super::rig::*;
use crate::engine::{Layout, Stopped};

/// Less than a device that holds commands needs, and more than a device that works.
const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(20);

fn suspend(process: &Process, limit: Duration) -> Stopped {
    process.rig.engine.suspend_ring(0, limit).unwrap().expect("it was started")
}

/// All guest memory.
fn contents(rig: &Rig) -> Vec<u8> {
    let memory = rig.region.memory();
    let mut bytes = vec![0; memory.len()];
    memory.copy_to(0, &mut bytes);
    bytes
}

#[test]
fn what_the_device_has_is_left_to_the_record_and_done_once_when_the_ring_starts_again() {
    for layout in BOTH {
        let (process, mut guest, mut sent) = with_four_in_flight(layout);
        let before = contents(&process.rig);

        let stopped = suspend(&process, SHORT);

        assert_eq!(stopped.left, 4);
        assert_eq!((process.rig.disk.recoveries(), process.rig.disk.held().len()), (1, 0), "it has no command");
        assert!(guest.used().is_empty(), "nothing is published");
        process.rig.disk.resume();
        assert_eq!(process.rig.engine.suspend_ring(0, SHORT).unwrap(), None, "it is not started");
        // The last store of a ring that stops asks the driver for kicks.
        let differing = contents(&process.rig).iter().zip(&before).filter(|(now, then)| now != then).count();
        assert!(differing <= 2, "{differing} bytes have changed");

        process.rig.disk.hold();
        sent.push(guest.request(IN, 9));
        let (region, record) = inflight(layout);
        super::crash::copy(&process.record, &record);
        let setup = guest.setup();
        process.start(crate::engine::VringSetup { inflight: Some(region), base: stopped.base, ..setup });

        assert_eq!(process.held(5), [0, 2, 4, 5, 9]);
        process.rig.disk.resume();
        let mut used: Vec<_> = guest.wait(5).iter().map(|used| used.0).collect();
        let mut heads: Vec<_> = sent.iter().map(|sent| u32::from(sent.head)).collect();
        used.sort_unstable();
        heads.sort_unstable();
        assert_eq!(used, heads, "{layout:?}");
        assert!(sent.iter().all(|sent| guest.driver().status(*sent) == 0));
        assert_eq!(process.rig.engine.statistics().errors, 0);
    }
}

#[test]
fn the_base_says_what_was_taken_and_what_was_used() {
    for (layout, expected) in [(Layout::Split, 6), (Layout::Packed, 0x8006_8012)] {
        let (process, mut guest, _) = with_four_in_flight(layout);
        guest.used();
        assert_eq!(suspend(&process, SHORT).base, expected, "{layout:?}");
    }
}

#[test]
fn a_drive_that_completes_in_time_is_not_reset() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let stopped = std::thread::scope(|scope| {
            let suspension = scope.spawn(|| suspend(&process, LONG));
            process.rig.disk.resume();
            suspension.join().unwrap()
        });

        assert_eq!((stopped.left, process.rig.disk.recoveries()), (0, 0));
        assert_eq!(guest.used().len(), 4);
    }
}

#[test]
fn other_rings_go_on_however_often_one_is_suspended() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let mut other = process.rig.driver(1, RingOptions::default());
        let sent = other.send(IN, 7, &[(DATA + 0x10000, 512)]);
        process.held(5);
        let mut left = suspend(&process, SHORT);

        for _ in 0..2 {
            assert_eq!(process.held(1), [7], "submitted again");
            let (region, record) = inflight(layout);
            super::crash::copy(&process.record, &record);
            let setup = guest.setup();
            process.start(crate::engine::VringSetup { inflight: Some(region), base: left.base, ..setup });
            process.held(5);
            left = suspend(&process, SHORT);
            assert_eq!(left.left, 4);
        }

        process.held(1);
        process.rig.disk.resume();
        assert_eq!(other.wait(1), [(u32::from(sent.head), 513)]);
        assert_eq!(other.status(sent), 0);
        assert!(guest.used().is_empty());
    }
}

#[test]
fn a_ring_without_a_record_is_drained() {
    let rig = Rig::new(DiskOptions::default());
    rig.disk.hold();
    let mut driver = rig.driver(0, RingOptions::default());
    let sent = driver.send(IN, 3, &[(DATA, 512)]);
    wait_until("a command", || rig.disk.held().len() == 1);

    let stopped = std::thread::scope(|scope| {
        let suspension = scope.spawn(|| rig.engine.suspend_ring(0, Duration::ZERO).unwrap());
        std::thread::sleep(SHORT);
        rig.disk.resume();
        suspension.join().unwrap()
    });

    assert_eq!((stopped, rig.disk.recoveries()), (Some(Stopped { base: 1, left: 0 }), 0));
    assert_eq!(driver.wait(1), [(u32::from(sent.head), 513)]);
}

#[test]
fn requests_that_wait_to_be_submitted_again_are_left_again() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        let (second, setup) = process.successor(1, &mut guest);
        second.start(setup);
        second.held(1);

        assert_eq!(suspend(&second, SHORT).left, 4);

        let (third, setup) = second.successor(64, &mut guest);
        third.start(setup);
        assert_eq!(third.held(4), [0, 2, 4, 5]);
        third.rig.disk.resume();
        guest.wait(4);
    }
}

#[test]
fn a_device_that_does_not_come_back_fails_nothing_that_is_left() {
    for layout in BOTH {
        let (process, mut guest, _) = with_four_in_flight(layout);
        process.rig.disk.fail_recovery();

        assert_eq!(suspend(&process, SHORT).left, 4);
        assert!(guest.used().is_empty());
    }
}
