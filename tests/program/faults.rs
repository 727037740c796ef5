//! Faults of the drive. A guest receives an error or the correct data in bounded time, and the drive is recovered for the
//! next request if possible. The command time-out is reduced to less than a second.

use testbed::client::{Client, Request, Ring, Shape};
use vmm_sys_util::tempdir::TempDir;

use crate::process::{LIMIT, Process};

const OK: u8 = 0;
const IOERR: u8 = 1;
/// Time-out of a command. Long enough for a loaded machine not to exceed it without a fault.
const TIMEOUT_MS: &str = "800";

/// Starts the program with a drive and `faults`, a list in TOML.
fn start_with(faults: &str, options: &str) -> Process {
    let directory = TempDir::new().unwrap();
    let file = directory.as_path().join("faults.toml");
    std::fs::write(&file, faults).unwrap();
    let device = format!("emulated:size=1M,faults={}{options}", file.display());
    let arguments =
        ["--socket-path", "DIR/socket", "--queues", "2", "--timeout-ms", TIMEOUT_MS, "--device", device.as_str()];
    let mut process = Process::start(&arguments);
    // The program reads the file at its start; it is removed at the end of this function.
    process.wait_until_listening_or_ended();
    process
}

fn start(faults: &str) -> Process {
    start_with(faults, "")
}

fn written(sector: u64) -> [u8; 512] {
    [sector.to_le_bytes()[0] | 0x80; 512]
}

/// Submits a read of `sector`.
fn submit_read(ring: &mut Ring, sector: u64) -> u16 {
    let slot = ring.submit(Request::Read { sector, bytes: 512 });
    ring.set_data(slot, &[0x11; 512]);
    slot
}

/// The status of the next completed request. Checks the data of a successful one.
fn outcome(ring: &mut Ring, sector_of: impl Fn(u16) -> u64) -> u8 {
    let done = ring.wait(LIMIT).unwrap().expect("a request ends in bounded time");
    if done.status == OK {
        let mut data = [0; 512];
        ring.data(done.slot, &mut data);
        assert!(data == written(sector_of(done.slot)), "wrong data: {data:x?}");
    }
    done.status
}

/// The status of a read of sector 3.
fn read(client: &mut Client) -> u8 {
    submit_read(&mut client.rings[0], 3);
    client.rings[0].publish();
    outcome(&mut client.rings[0], |_| 3)
}

/// Injects `fault` into one read of a guest. Returns the status of this read, of the guest's next one, and of a read by the
/// next guest.
fn outcomes_on(fault: &str, shape: Shape, options: &str) -> [u8; 3] {
    let process = start_with(&format!("[[fault]]\nqueue = 1\nopcode = \"read\"\n{fault}"), options);
    let mut client = process.client_of(shape);
    client.write(3, &written(3)).unwrap();
    let (first, second) = (read(&mut client), read(&mut client));
    drop(client);
    let third = read(&mut process.client_of(shape));
    let log = process.log();
    assert!(!log.contains("panicked") && !log.contains("bug"), "{fault}: {log}");
    [first, second, third]
}

/// The same, which must not depend on the ring's layout or the drive's mode.
fn outcomes(fault: &str) -> [u8; 3] {
    let [split, packed] = [false, true].map(|packed| Shape { packed, ..Shape::default() });
    let found = outcomes_on(fault, split, "");
    assert_eq!(outcomes_on(fault, packed, ",mode=inline"), found, "{fault}: packed, inline");
    found
}

#[test]
fn an_error_status_fails_only_its_request() {
    assert_eq!(outcomes("effect = \"status\"\nstatus = 0x281"), [IOERR, OK, OK]);
}

#[test]
fn a_duplicate_completion_is_ignored() {
    assert_eq!(outcomes("effect = \"twice\""), [OK, OK, OK]);
}

#[test]
fn a_late_completion_is_waited_for() {
    assert_eq!(outcomes_on("effect = \"delay\"\ndelay = \"200ms\"", Shape::default(), ""), [OK, OK, OK]);
}

#[test]
fn a_command_that_times_out_is_aborted_and_fails() {
    assert_eq!(outcomes("effect = \"delay\"\ndelay = \"3600s\""), [IOERR, OK, OK]);
}

#[test]
fn a_lost_interrupt_only_delays_the_request() {
    assert_eq!(outcomes("effect = \"lose-interrupt\""), [OK, OK, OK]);
}

#[test]
fn after_a_lost_completion_the_command_is_repeated() {
    assert_eq!(outcomes("effect = \"lose\""), [OK, OK, OK]);
}

#[test]
fn a_completion_lost_twice_fails_the_request() {
    assert_eq!(outcomes("effect = \"lose\"\ntimes = 2"), [IOERR, OK, OK]);
}

#[test]
fn after_a_completion_with_a_wrong_identifier_the_command_is_repeated() {
    assert_eq!(outcomes("effect = \"wrong-id\"\nid = 77"), [OK, OK, OK]);
}

#[test]
fn after_a_completion_with_the_wrong_phase_the_command_is_repeated() {
    assert_eq!(outcomes("effect = \"wrong-phase\""), [OK, OK, OK]);
}

#[test]
fn a_controller_with_fatal_status_is_reset_and_the_request_repeated() {
    assert_eq!(outcomes("effect = \"fatal\""), [OK, OK, OK]);
}

#[test]
fn requests_fail_if_a_reset_does_not_recover_the_controller() {
    assert_eq!(outcomes("effect = \"stick\""), [IOERR, IOERR, IOERR]);
}

#[test]
fn requests_fail_after_the_drive_is_removed() {
    assert_eq!(outcomes("effect = \"remove\""), [IOERR, IOERR, IOERR]);
}

#[test]
fn recovery_needs_no_function_reset_if_the_controller_can_be_disabled() {
    let faults = "[[fault]]\nqueue = 1\nopcode = \"read\"\neffect = \"lose\"\n[[fault]]\neffect = \"reset-refused\"";
    let process = start(faults);
    let mut client = process.client();
    client.write(3, &written(3)).unwrap();
    assert_eq!([read(&mut client), read(&mut client)], [OK, OK]);
}

#[test]
fn many_requests_in_flight_all_succeed_despite_faults() {
    let effects = ["lose", "twice", "wrong-phase", "wrong-id", "lose-interrupt", "fatal"];
    let fault = |(n, effect)| format!("[[fault]]\nopcode = \"read\"\nskip = {}\neffect = \"{effect}\"\n", 50 * n);
    let mut faults = (1..).zip(effects).map(fault).collect::<String>();
    faults = faults.replace("\"wrong-id\"", "\"wrong-id\"\nid = 77");
    let process = start(&faults);
    let mut client = process.client_of(Shape { queues: 2, depth: 32, ..Shape::default() });
    for sector in 0..64 {
        client.write(sector, &written(sector)).unwrap();
    }
    for round in 0..8 {
        for ring in &mut client.rings {
            let mut sectors = [0; 32];
            for n in 0..32 {
                let sector = (n * 7 + round) % 64;
                let slot = submit_read(ring, sector);
                sectors[usize::from(slot)] = sector;
            }
            ring.publish();
            for _ in 0..32 {
                // No fault hits a request twice, so each is repeated successfully.
                assert_eq!(outcome(ring, |slot| sectors[usize::from(slot)]), OK, "round {round}");
            }
        }
    }
    assert!(!process.log().contains("panicked"), "{}", process.log());
}

#[test]
fn stopping_a_ring_completes_a_lost_request() {
    let process = start("[[fault]]\nqueue = 1\nopcode = \"read\"\neffect = \"lose\"");
    let mut client = process.client();
    submit_read(&mut client.rings[0], 3);
    submit_read(&mut client.rings[0], 3);
    client.rings[0].publish();
    // The second completes, so the first has been submitted.
    client.rings[0].wait(LIMIT).unwrap().expect("one has no fault");

    client.stop(0).unwrap();

    assert!(client.rings[0].reap().is_some());
}

#[test]
fn the_program_with_a_faulty_drive_still_ends_on_sigterm() {
    for effect in ["lose", "stick", "remove"] {
        let mut process = start(&format!("[[fault]]\nqueue = 1\neffect = \"{effect}\""));
        let mut client = process.client();
        submit_read(&mut client.rings[0], 3);
        client.rings[0].publish();
        let output = process.stop();
        assert!(output.status.success(), "{effect}: {:?}: {}", output.status, output.log);
    }
}

#[test]
fn a_drive_that_is_faulty_at_the_start_is_refused_with_the_reason() {
    for (fault, reason) in [
        ("effect = \"removed\"", "all ones"),
        ("effect = \"stuck-ready\"", "CSTS.RDY"),
        ("effect = \"capability\"\nvalue = \"0x0\"", "no NVM command set"),
        ("effect = \"capability\"\nvalue = \"0x2000000000\"", "largest queue (CAP.MQES)"),
        ("effect = \"capability\"\nvalue = \"0x100200f0007ff\"", "smallest memory page (CAP.MPSMIN)"),
        ("effect = \"capability\"\nvalue = \"0x2f0f0007ff\"", "doorbell stride (CAP.DSTRD)"),
        ("effect = \"status\"\nstatus = 6\nqueue = 0\nopcode = 6", "Internal Error"),
        ("effect = \"identify\"\ncns = 0\noffset = 0\nbytes = [0, 0, 0, 0, 0, 0, 0, 0]", "namespace"),
    ] {
        let mut process = start(&format!("[[fault]]\n{fault}"));
        let output = process.wait_for_exit();
        assert_eq!(output.status.code(), Some(1), "{fault}: {}", output.log);
        let last = output.log.lines().last().unwrap();
        assert!(last.starts_with("vhost-device-vfio: ") && last.contains(reason), "{fault}: {}", output.log);
    }
}

#[test]
fn an_invalid_list_of_faults_is_one_line_and_status_2() {
    let output = Process::run(&["--socket-path", "DIR/socket", "--device", "emulated:faults=DIR/missing"]);
    assert_eq!((output.status.code(), output.log.lines().count()), (Some(2), 1), "{}", output.log);
    let output = start("[[fault]]\neffect = \"loose\"").wait_for_exit();
    assert_eq!((output.status.code(), output.log.lines().count()), (Some(2), 1), "{}", output.log);
    assert!(output.log.contains("fault 1: unknown effect `loose`; the effects are lose, twice"), "{}", output.log);
}
