//! A drive that breaks, and what its guest sees: the right data or an error, within bounded time, and a drive that works
//! again for the next request if it can be made to.
//!
//! A command that never comes back is given up by a watch, after half a minute, or when its ring stops. The tests take the
//! short way; whether the request is repeated then or ends with an error is the engine's choice.

use std::time::Duration;

use testbed::client::{Client, Done, Request};
use vmm_sys_util::tempdir::TempDir;

use crate::process::Process;

/// Until the ring is stopped under a request that does not end by itself.
const BEFORE_STOP: Duration = Duration::from_secs(1);
const OK: u8 = 0;
const IOERR: u8 = 1;

/// Starts the program with a drive and `faults`, a list in TOML.
fn start(faults: &str) -> Process {
    let directory = TempDir::new().unwrap();
    let file = directory.as_path().join("faults.toml");
    std::fs::write(&file, faults).unwrap();
    let device = format!("emulated:size=1M,faults={}", file.display());
    let mut process = Process::start(&["--socket-path", "DIR/socket", "--queues", "1", "--device", &device]);
    // The file is read at the start, and is needed until then.
    process.wait_until_listening_or_ended();
    process
}

fn written(sector: u64) -> [u8; 512] {
    [sector.to_le_bytes()[0] | 0x80; 512]
}

/// Submits a read of sector 3, which holds something.
fn read(client: &mut Client) -> u16 {
    let ring = &mut client.rings[0];
    let slot = ring.submit(Request::Read { sector: 3, bytes: 512 });
    ring.set_data(slot, &[0x11; 512]);
    ring.publish();
    slot
}

/// How the request ended, by itself or when its ring was stopped. A good end means good data.
fn outcome(client: &mut Client, slot: u16) -> u8 {
    let done = client.rings[0].wait(BEFORE_STOP).unwrap().or_else(|| {
        client.stop(0).unwrap();
        client.rings[0].reap()
    });
    let Done { slot: found, status } = done.expect("a ring that has stopped has answered what it took");
    assert_eq!(found, slot);
    if status == OK {
        let mut data = [0; 512];
        client.rings[0].data(slot, &mut data);
        assert!(data == written(3), "wrong data: {data:x?}");
    }
    status
}

/// Strikes one read of a guest with `fault` and says how this read ended, and one of the next guest's.
fn struck(fault: &str) -> (u8, u8) {
    let process = start(&format!("[[fault]]\nqueue = 1\nopcode = \"read\"\n{fault}"));
    let mut client = process.client();
    client.write(3, &written(3)).unwrap();
    let slot = read(&mut client);
    let first = outcome(&mut client, slot);
    drop(client);
    let mut client = process.client();
    let slot = read(&mut client);
    (first, outcome(&mut client, slot))
}

/// The request struck ends with the right data or an error, and the drive works for the next guest.
fn recovers(fault: &str) {
    let (first, next) = struck(fault);
    assert!((first == OK || first == IOERR) && next == OK, "{fault}: {first}, then {next}");
}

#[test]
fn a_status_is_an_error_of_that_request_alone() {
    assert_eq!(struck("effect = \"status\"\nstatus = 0x281"), (IOERR, OK));
}

#[test]
fn a_completion_that_comes_twice_or_late_does_no_harm() {
    assert_eq!(struck("effect = \"twice\""), (OK, OK));
    assert_eq!(struck("effect = \"delay\"\ndelay = \"200ms\""), (OK, OK));
}

#[test]
fn a_lost_interrupt_costs_time_at_most() {
    recovers("effect = \"lose-interrupt\"");
}

#[test]
fn a_lost_completion_is_made_up_for_or_an_error() {
    recovers("effect = \"lose\"");
}

#[test]
fn a_completion_under_another_identifier_is_made_up_for_or_an_error() {
    recovers("effect = \"wrong-id\"\nid = 77");
}

#[test]
fn a_completion_of_the_wrong_phase_is_made_up_for_or_an_error() {
    recovers("effect = \"wrong-phase\"");
}

#[test]
fn a_controller_with_fatal_status_is_reset_and_recovers() {
    recovers("effect = \"fatal\"");
}

#[test]
fn a_controller_that_no_reset_helps_leaves_errors() {
    assert_eq!(struck("effect = \"stick\""), (IOERR, IOERR));
}

#[test]
fn a_drive_pulled_out_leaves_errors() {
    assert_eq!(struck("effect = \"remove\""), (IOERR, IOERR));
}

#[test]
fn a_program_with_a_broken_drive_still_ends_when_told() {
    for effect in ["lose", "stick", "remove"] {
        let mut process = start(&format!("[[fault]]\nqueue = 1\neffect = \"{effect}\""));
        let mut client = process.client();
        read(&mut client);
        let ended = process.stop();
        assert!(ended.status.success(), "{effect}: {:?}: {}", ended.status, ended.log);
    }
}

#[test]
fn a_drive_that_is_broken_from_the_start_is_refused_with_the_reason() {
    for (fault, reason) in [
        ("effect = \"removed\"", "all ones"),
        ("effect = \"stuck-ready\"", "CSTS.RDY"),
        ("effect = \"capability\"\nvalue = \"0x0\"", "no NVM command set"),
        ("effect = \"capability\"\nvalue = \"0x2000000000\"", "largest queue (CAP.MQES)"),
        ("effect = \"status\"\nstatus = 6\nqueue = 0\nopcode = 6", "Internal Error"),
        ("effect = \"identify\"\ncns = 0\noffset = 0\nbytes = [0, 0, 0, 0, 0, 0, 0, 0]", "namespace"),
    ] {
        let mut process = start(&format!("[[fault]]\n{fault}"));
        let ended = process.end();
        assert_eq!(ended.status.code(), Some(1), "{fault}: {}", ended.log);
        let last = ended.log.lines().last().unwrap();
        assert!(last.starts_with("vhost-device-vfio: ") && last.contains(reason), "{fault}: {}", ended.log);
    }
}

#[test]
fn a_refused_reset_is_not_needed_while_the_drive_works() {
    let process = start("[[fault]]\neffect = \"reset-refused\"");
    let mut client = process.client();
    client.write(3, &written(3)).unwrap();
    let slot = read(&mut client);
    assert_eq!(outcome(&mut client, slot), OK);
}

#[test]
fn a_wrong_list_of_faults_is_one_line_and_status_2() {
    let ended = Process::run(&["--socket-path", "DIR/socket", "--device", "emulated:faults=DIR/missing"]);
    assert_eq!((ended.status.code(), ended.log.lines().count()), (Some(2), 1), "{}", ended.log);
    let ended = start("[[fault]]\neffect = \"loose\"").end();
    assert_eq!((ended.status.code(), ended.log.lines().count()), (Some(2), 1), "{}", ended.log);
    assert!(ended.log.contains("fault 1: no effect `loose`; there are lose, twice"), "{}", ended.log);
}
