//! What a guest sees of a broken drive: an error, or the right data, in bounded time, and a drive that works again for the
//! next request if it can be made to. Nobody stops a ring here: what never comes back is noticed by the program itself,
//! whose patience is cut to less than a second.

use testbed::client::{Client, Request, Ring, Shape};
use vmm_sys_util::tempdir::TempDir;

use crate::process::{LIMIT, Process};

const OK: u8 = 0;
const IOERR: u8 = 1;
/// Longer than any hiccup of a loaded machine that should not be taken for a fault.
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
    // The file is read at the start, and is needed until then.
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

/// How the next request that ends has ended. A good end means good data.
fn outcome(ring: &mut Ring, sector_of: impl Fn(u16) -> u64) -> u8 {
    let done = ring.wait(LIMIT).unwrap().expect("a request ends in bounded time");
    if done.status == OK {
        let mut data = [0; 512];
        ring.data(done.slot, &mut data);
        assert!(data == written(sector_of(done.slot)), "wrong data: {data:x?}");
    }
    done.status
}

/// How a read of sector 3 ends.
fn read(client: &mut Client) -> u8 {
    submit_read(&mut client.rings[0], 3);
    client.rings[0].publish();
    outcome(&mut client.rings[0], |_| 3)
}

/// Strikes one read of a guest with `fault`; how this one ended, the next of the same guest, and one of the next guest.
fn struck_on(fault: &str, shape: Shape, options: &str) -> [u8; 3] {
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

fn struck(fault: &str) -> [u8; 3] {
    let [split, packed] = [false, true].map(|packed| Shape { packed, ..Shape::default() });
    let found = struck_on(fault, split, "");
    assert_eq!(struck_on(fault, packed, ",mode=inline"), found, "{fault}: the same on another ring and another drive");
    found
}

#[test]
fn a_status_is_an_error_of_that_request_alone() {
    assert_eq!(struck("effect = \"status\"\nstatus = 0x281"), [IOERR, OK, OK]);
}

#[test]
fn a_completion_that_comes_twice_does_no_harm() {
    assert_eq!(struck("effect = \"twice\""), [OK, OK, OK]);
}

#[test]
fn a_completion_that_comes_late_is_waited_for() {
    assert_eq!(struck_on("effect = \"delay\"\ndelay = \"200ms\"", Shape::default(), ""), [OK, OK, OK]);
}

#[test]
fn a_command_that_takes_too_long_is_aborted_and_is_an_error() {
    assert_eq!(struck("effect = \"delay\"\ndelay = \"3600s\""), [IOERR, OK, OK]);
}

#[test]
fn a_lost_interrupt_costs_time_at_most() {
    assert_eq!(struck("effect = \"lose-interrupt\""), [OK, OK, OK]);
}

#[test]
fn a_lost_completion_is_made_up_for() {
    assert_eq!(struck("effect = \"lose\""), [OK, OK, OK]);
}

#[test]
fn a_completion_lost_twice_is_an_error() {
    assert_eq!(struck("effect = \"lose\"\ntimes = 2"), [IOERR, OK, OK]);
}

#[test]
fn a_completion_under_another_identifier_is_made_up_for() {
    assert_eq!(struck("effect = \"wrong-id\"\nid = 77"), [OK, OK, OK]);
}

#[test]
fn a_completion_of_the_wrong_phase_is_made_up_for() {
    assert_eq!(struck("effect = \"wrong-phase\""), [OK, OK, OK]);
}

#[test]
fn a_controller_with_fatal_status_is_reset_and_the_request_repeated() {
    assert_eq!(struck("effect = \"fatal\""), [OK, OK, OK]);
}

#[test]
fn a_controller_that_no_reset_helps_leaves_errors() {
    assert_eq!(struck("effect = \"stick\""), [IOERR, IOERR, IOERR]);
}

#[test]
fn a_drive_pulled_out_leaves_errors() {
    assert_eq!(struck("effect = \"remove\""), [IOERR, IOERR, IOERR]);
}

#[test]
fn a_function_reset_that_is_refused_is_not_needed_while_the_controller_can_be_disabled() {
    let faults = "[[fault]]\nqueue = 1\nopcode = \"read\"\neffect = \"lose\"\n[[fault]]\neffect = \"reset-refused\"";
    let process = start(faults);
    let mut client = process.client();
    client.write(3, &written(3)).unwrap();
    assert_eq!([read(&mut client), read(&mut client)], [OK, OK]);
}

#[test]
fn of_many_requests_in_flight_each_ends_with_its_data_or_an_error_whatever_strikes_in_between() {
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
                // None was struck twice, so none is lost for good.
                assert_eq!(outcome(ring, |slot| sectors[usize::from(slot)]), OK, "round {round}");
            }
        }
    }
    assert!(!process.log().contains("panicked"), "{}", process.log());
}

#[test]
fn a_ring_that_stops_under_a_lost_request_has_answered_it() {
    let process = start("[[fault]]\nqueue = 1\nopcode = \"read\"\neffect = \"lose\"");
    let mut client = process.client();
    submit_read(&mut client.rings[0], 3);
    submit_read(&mut client.rings[0], 3);
    client.rings[0].publish();
    // The second comes back, so the first has been taken.
    client.rings[0].wait(LIMIT).unwrap().expect("one was not struck");

    client.stop(0).unwrap();

    assert!(client.rings[0].reap().is_some());
}

#[test]
fn a_program_with_a_broken_drive_still_ends_when_told() {
    for effect in ["lose", "stick", "remove"] {
        let mut process = start(&format!("[[fault]]\nqueue = 1\neffect = \"{effect}\""));
        let mut client = process.client();
        submit_read(&mut client.rings[0], 3);
        client.rings[0].publish();
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
        ("effect = \"capability\"\nvalue = \"0x100200f0007ff\"", "smallest memory page (CAP.MPSMIN)"),
        ("effect = \"capability\"\nvalue = \"0x2f0f0007ff\"", "doorbell stride (CAP.DSTRD)"),
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
fn a_wrong_list_of_faults_is_one_line_and_status_2() {
    let ended = Process::run(&["--socket-path", "DIR/socket", "--device", "emulated:faults=DIR/missing"]);
    assert_eq!((ended.status.code(), ended.log.lines().count()), (Some(2), 1), "{}", ended.log);
    let ended = start("[[fault]]\neffect = \"loose\"").end();
    assert_eq!((ended.status.code(), ended.log.lines().count()), (Some(2), 1), "{}", ended.log);
    assert!(ended.log.contains("fault 1: unknown effect `loose`; the effects are lose, twice"), "{}", ended.log);
}
