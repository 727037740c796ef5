//! A zoned drive that is reset with requests in flight. What may have been executed is not executed again unnoticed.

use super::nvme::NVM_WRITE;
use super::zoned::{
    CAPACITY, FINISH, IOERR, NVM_APPEND, ZONE, append, manage, options, pattern, read, up, write, zone,
};
use vmm_sys_util::tempdir::TempDir;

use crate::emulated::{Commands, Effect, Fault, Medium, Options, Status};

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
