//! The device is lent to another driver while requests are in flight, as to one in another process.

use std::time::Duration;

use super::nvme::{Drive, NVM_WRITE};
use super::rig::*;
use crate::driver::Driver;
use crate::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use crate::emulated::{Commands, Effect, Fault, Mode, Options};
use crate::engine::WatchdogOptions;
use crate::hardware::LeftToSuccessor;

fn drive() -> Drive {
    let options = Options { size: 16 << 20, queues: 2, mode: Mode::Threaded, ..Options::default() };
    Drive::with_watchdog(options, Duration::ZERO, Duration::from_secs(20), WatchdogOptions::default())
}

fn successor(drive: &Drive) -> Nvme {
    let wanted = NvmeOptions {
        namespaces: Vec::new(),
        queues: 1,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    };
    Nvme::bring_up(drive.machine.function(), drive.machine.staged_space(), wanted).unwrap()
}

#[test]
fn requests_in_flight_wait_while_the_device_is_lent_and_complete_when_it_is_back() {
    let drive = drive();
    let mut driver = drive.driver(0, RingOptions::default());
    driver.fill(DATA, &[0x5a; 512]);
    drive.machine.inject(Fault::once(Commands { queue: Some(1), opcode: Some(NVM_WRITE) }, Effect::Lose));
    let sent = driver.send(OUT, 5, &[(DATA, 512)]);
    let traffic = || drive.machine.traffic().writes;
    while traffic() == 0 {
        std::thread::yield_now();
    }

    drive.engine.lend_device().unwrap();
    assert!(drive.engine.lend_device().is_err(), "it is lent already");
    let other = successor(&drive);
    let unmapped = std::cell::Cell::new(0);
    drive.engine.take_device_back(|| {
        std::mem::forget(other);
        unmapped.set(unmapped.get() + 1);
    });
    drive.engine.take_device_back(|| unmapped.set(unmapped.get() + 1));

    assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
    assert_eq!((driver.status(sent), unmapped.get()), (0, 1));
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.resubmitted, statistics.errors), (1, 0), "{statistics}");
}

#[test]
fn an_engine_that_has_left_its_device_does_not_touch_it() {
    let drive = drive();
    drive.engine.lend_device().unwrap();
    let mut other = successor(&drive);

    drive.engine.leave_device(&LeftToSuccessor::new());
    drive.engine.take_device_back(|| panic!("it does not come back"));
    drop(drive.engine);

    other.check().unwrap();
    other.set_write_cache(false).unwrap();
}
