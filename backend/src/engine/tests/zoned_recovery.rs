//! A zoned drive that is reset with requests in flight. What may have been executed is not executed again unnoticed.

use super::crash::{copy, inflight};
use super::nvme::{Drive, NVM_WRITE};
use super::rig::*;
use super::zoned::{
    CAPACITY, FINISH, INVALID_CMD, IOERR, NVM_APPEND, ZONE, append, manage, options, pattern, read, up, write, zone,
};
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use crate::emulated::{Commands, Effect, Fault, Medium, Options, Status};
use crate::engine::{Layout, VringSetup, WatchdogOptions};

/// Zone Management Receive (ZNS Command Set 1.1 §3.4.2).
const NVM_REPORT: u8 = 0x7a;

fn on(opcode: u8) -> Commands {
    Commands { queue: Some(1), opcode: Some(opcode) }
}

/// `effect` on the third command.
fn third(opcode: u8, effect: Effect) -> Fault {
    Fault::Command { on: on(opcode), skip: 2, times: 1, effect }
}

#[test]
fn an_append_whose_completion_is_lost_fails_and_is_not_executed_again() {
    let (drive, mut driver) = up(options());
    drive.machine.inject(Fault::once(on(NVM_APPEND), Effect::Lose));

    assert_eq!(append(&mut driver, ZONE, &[1; 4096]).0, IOERR);

    assert_eq!(zone(&mut driver, ZONE).0, 8, "executed once");
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.recoveries, statistics.resubmitted), (1, 0), "{statistics}");
    assert_eq!(append(&mut driver, ZONE, &[2; 4096]), (0, ZONE + 8), "the next one is behind it");
}

#[test]
fn a_write_continues_after_a_reset_where_it_was() {
    let (drive, mut driver) = up(options());
    let data = pattern(1, 700 << 10);
    drive.machine.inject(third(NVM_WRITE, Effect::Fatal));

    assert_eq!(write(&mut driver, ZONE, &data), 0);

    assert!(read(&mut driver, ZONE, data.len()) == data);
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.recoveries, statistics.resubmitted, statistics.errors), (1, 1, 0), "{statistics}");
    assert_eq!(drive.machine.traffic().writes, 6, "no command was executed twice");
}

#[test]
fn a_device_that_places_an_append_outside_its_zone_is_not_believed() {
    let (drive, mut driver) = up(options());
    assert_eq!(append(&mut driver, ZONE, &[1; 512]), (0, ZONE));
    // Completed without having been executed: "placed" at block 0.
    drive.machine.inject(Fault::once(on(NVM_APPEND), Effect::Status(Status::SUCCESS)));
    assert_eq!(append(&mut driver, ZONE, &[1; 512]).0, IOERR);
}

#[test]
fn the_next_process_finds_the_zones_of_a_drive_as_they_were() {
    let directory = TempDir::new().unwrap();
    let medium = Medium::File { path: directory.as_path().join("disk"), create: true, sparse: true };
    let options = || Options { medium: medium.clone(), ..options() };
    let (drive, mut driver) = up(options());
    assert_eq!((write(&mut driver, 0, &[1; 4096]), append(&mut driver, ZONE, &[2; 512]).0), (0, 0));
    assert_eq!(manage(&mut driver, FINISH, 2 * ZONE), 0);
    drop((driver, drive));

    let (_drive, mut driver) = up(options());

    let zones = [0, ZONE, 2 * ZONE, 3 * ZONE].map(|sector| zone(&mut driver, sector));
    assert_eq!(zones, [(8, 2), (1, 2), (CAPACITY, 14), (0, 1)]);
    assert_eq!(append(&mut driver, ZONE, &[3; 512]), (0, ZONE + 1));
}

#[test]
fn a_write_whose_last_command_was_executed_is_complete_and_not_executed_again() {
    let (drive, mut driver) = up(options());
    // Six commands: the third, and then the last of another write, of which only the completions are lost.
    let (first, second) = (pattern(1, 700 << 10), pattern(2, 4096));
    drive.machine.inject(third(NVM_WRITE, Effect::Lose));
    assert_eq!(write(&mut driver, ZONE, &first), 0);
    drive.machine.inject(Fault::once(on(NVM_WRITE), Effect::Lose));
    assert_eq!(write(&mut driver, ZONE + 1400, &second), 0);

    assert!(read(&mut driver, ZONE, first.len()) == first && read(&mut driver, ZONE + 1400, second.len()) == second);
    assert_eq!(zone(&mut driver, ZONE).0, 1408);
    let statistics = drive.engine.statistics();
    assert_eq!((statistics.recoveries, statistics.resubmitted, statistics.errors), (2, 2, 0), "{statistics}");
    assert_eq!(drive.machine.traffic().writes, 7, "commands");
}

#[test]
fn a_write_whose_zone_is_not_reported_goes_on_behind_what_was_completed() {
    let (drive, mut driver) = up(options());
    let data = pattern(1, 700 << 10);
    drive.machine.inject(third(NVM_WRITE, Effect::Fatal));
    drive.machine.inject(Fault::once(on(NVM_REPORT), Effect::Status(Status::INTERNAL_ERROR)));

    assert_eq!(write(&mut driver, ZONE, &data), 0);

    assert!(read(&mut driver, ZONE, data.len()) == data);
    assert_eq!(drive.machine.traffic().writes, 6, "no command was executed twice");
}

#[test]
fn a_write_of_the_process_before_goes_on_where_the_zone_was_left() {
    let directory = TempDir::new().unwrap();
    let medium = Medium::File { path: directory.as_path().join("disk"), create: true, sparse: true };
    let drive = || {
        let engine = crate::engine::Options {
            rings: 1,
            spin: Duration::ZERO,
            drain_timeout: Duration::from_millis(50),
            watch: WatchdogOptions::default(),
            placement: Default::default(),
        };
        Drive::with(Options { medium: medium.clone(), ..options() }, engine, LEN)
    };
    let before = drive();
    before.machine.inject(third(NVM_WRITE, Effect::Lose));
    let (mut driver, setup) = SplitDriver::new(before.region.memory().clone(), 0, RingOptions::default());
    let (region, record) = inflight(Layout::Split);
    before.engine.start_ring(VringSetup { inflight: Some(region), ..setup }).unwrap();
    before.engine.set_enabled(0, true);
    let data = pattern(1, 700 << 10);
    driver.fill(DATA, &data);
    let sent = driver.send(OUT, ZONE, &[(DATA, data.len() as u32)]);
    wait_until("three commands", || before.machine.traffic().writes == 3);
    let (memory, found) = (driver.bytes(BASE, LEN as usize), record);
    let (region, record) = inflight(Layout::Split);
    copy(&found, &record);
    drop(before);

    let next = drive();
    driver.memory = next.region.memory().clone();
    driver.fill(BASE, &memory);
    next.engine.start_ring(VringSetup { inflight: Some(region), ..driver.setup(0) }).unwrap();
    next.engine.set_enabled(0, true);

    assert_eq!(driver.wait(1), [(u32::from(sent.head), 1)]);
    assert_eq!(driver.status(sent), 0);
    assert!(read(&mut driver, ZONE, data.len()) == data);
    assert_eq!(next.machine.traffic().writes, 3, "the rest of six commands");
}

#[test]
fn the_last_write_of_a_zone_fails_if_it_may_have_been_executed() {
    let (drive, mut driver) = up(options());
    assert_eq!(write(&mut driver, ZONE, &vec![1; (CAPACITY as usize - 8) * 512]), 0);
    drive.machine.inject(Fault::once(on(NVM_WRITE), Effect::Lose));

    assert_eq!(write(&mut driver, ZONE + CAPACITY - 8, &[2; 4096]), INVALID_CMD, "a full zone does not tell");

    assert_eq!(zone(&mut driver, ZONE).1, 14);
}
