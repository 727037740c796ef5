//! Several namespaces of one drive, each with a socket, a front-end and a disk of its own. All front-ends have their memory at
//! the same guest physical addresses.

use std::os::unix::net::UnixStream;
use std::path::Path;

use testbed::client::{Buffer, Client, Region, Request, Shape};
use testbed::kills::Background;
use vmm_sys_util::tempdir::TempDir;

use crate::process::{LIMIT, Process};

const OK: u8 = 0;
const IOERR: u8 = 1;
const SOCKETS: [&str; 2] = ["socket", "socket2"];
const TWO: [&str; 8] =
    ["--socket-path", "DIR/socket", "--socket-path", "DIR/socket2", "--namespace", "1", "--namespace", "2"];

/// Two namespaces of an emulated drive.
fn serve(options: &str, more: &[&str]) -> Process {
    let device = format!("emulated:namespaces=2,{options}");
    let mut process = Process::start(&[&TWO[..], &["--device", &device, "--queues", "2"], more].concat());
    // The listening sockets come before the drive is up, and a front-end waits in their backlog.
    process.wait_until("it serves", |process| process.log().contains("serving emulated namespace 2"));
    process
}

/// The same with faults of the drive, a list in TOML, on an empty disk in a file.
fn serve_with_faults(faults: &str, options: &str) -> Process {
    let directory = TempDir::new().unwrap();
    let file = directory.as_path().join("faults.toml");
    std::fs::write(&file, faults).unwrap();
    let options = format!("size={},faults={},{options}", Background::DISK, file.display());
    serve(&options, &["--timeout-ms", "800"])
}

fn client(process: &Process, socket: &str) -> Client {
    let connect = || Client::connect(&process.path(socket), Shape::default());
    // The server rejects it as long as it takes the one before for connected.
    let found = (0..20).find_map(|_| connect().inspect_err(|_| std::thread::sleep(LIMIT / 200)).ok());
    found.unwrap_or_else(|| panic!("{socket}: no session; its log:\n{}", process.log()))
}

fn clients(process: &Process) -> [Client; 2] {
    SOCKETS.map(|socket| client(process, socket))
}

/// An oracle's load on two queues of each disk.
fn loads(process: &Process) -> [Background; 2] {
    let shape = Shape { queues: 2, depth: 32, bytes: 32 << 10, ..Shape::default() };
    SOCKETS.map(|socket| {
        let socket = UnixStream::connect(process.path(socket)).unwrap();
        Background::start(socket, shape, Region::Kept, 1)
            .unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()))
    })
}

fn finish(load: Background, process: &Process) {
    load.finish().unwrap_or_else(|error| panic!("{error}; its log:\n{}", process.log()));
}

/// The lines of the log that have `part`.
fn lines(process: &Process, part: &str) -> usize {
    process.log().lines().filter(|line| line.contains(part)).count()
}

fn pattern(disk: u8, sector: u64) -> [u8; 4096] {
    std::array::from_fn(|i| disk ^ (sector.wrapping_mul(37) + i as u64 / 7).to_le_bytes()[0])
}

/// Each front-end writes to the same sectors from the same guest addresses, and reads what it has written.
fn each_has_its_own_data(clients: &mut [Client; 2]) {
    for round in 0..4 {
        let sectors = (0..128).step_by(8).map(|sector| sector + round * 1024);
        for sector in sectors.clone() {
            for (disk, client) in (1..).zip(clients.iter_mut()) {
                client.write(sector, &pattern(disk, sector)).unwrap();
            }
        }
        for sector in sectors {
            for (disk, client) in (1..).zip(clients.iter_mut()) {
                let mut found = [0; 4096];
                client.read(sector, &mut found).unwrap();
                assert!(found == pattern(disk, sector), "disk {disk}, sector {sector}");
            }
        }
    }
}

#[test]
fn two_guests_with_the_same_addresses_have_disks_of_their_own() {
    for options in [
        "size=8M",
        "size=8M,lba=4096,sgl=on",
        "size=8M,mode=inline,width=39",
        "size=8M,no-snoop=controllable,snoop-enforced=off",
    ] {
        let mut process = serve(options, &["--no-snoop", "allow"]);
        let mut both = clients(&process);
        assert_eq!(both.each_ref().map(Client::capacity), [8 << 11; 2], "{options}");

        each_has_its_own_data(&mut both);

        drop(both);
        let log = process.stop().log;
        assert_eq!(log.contains("DMA is not coherent: flushed"), options.contains("enforced=off"), "{log}");
        assert!(log.contains("IOVA = GPA + 0x0, "), "the first has its own addresses: {log}");
        for id in [1, 2] {
            assert!(log.contains(&format!("statistics: namespace={id} reads=64 writes=64 ")), "{log}");
        }
    }
}

#[test]
fn the_file_of_the_drive_has_one_part_for_each_namespace() {
    let mut process = serve("file=DIR/disk,create=on,size=1M", &[]);
    let [mut first, mut second] = clients(&process);
    first.write(2040, &pattern(1, 2040)).unwrap();
    second.write(0, &pattern(2, 0)).unwrap();
    assert!(first.write(2048, &[1; 512]).is_err(), "the next sector is another namespace's");
    drop((first, second));
    let file = process.path("disk");

    process.stop();

    let file = std::fs::read(file).unwrap();
    assert_eq!(file.len(), 2 << 20);
    assert!(file[(1 << 20) - 4096..1 << 20] == pattern(1, 2040) && file[1 << 20..][..4096] == pattern(2, 0));
}

#[test]
fn a_reset_under_load_loses_no_request_of_either_guest() {
    // Queues 1 and 2 are the first disk's, 3 and 4 the second's.
    for queue in [1, 4] {
        reset_under_load(queue);
    }
}

/// A completion in `queue` is lost, so the drive is reset for both.
fn reset_under_load(queue: u16) {
    let faults = format!("[[fault]]\nqueue = {queue}\nskip = 300\neffect = \"lose\"\n");
    let mut process = serve_with_faults(&faults, "latency=2ms,order=random,queues=4");
    let loads = loads(&process);
    process.wait_until("a reset", |process| lines(process, "resetting the controller") >= 1);
    loads.iter().for_each(|load| load.progresses(500));

    for load in loads {
        finish(load, &process);
    }
    let log = process.stop().log;
    let statistics: Vec<_> = log.lines().filter(|line| line.contains("statistics: ")).collect();
    assert!(statistics.len() == 2 && statistics.iter().all(|line| line.contains(" errors=0 ")), "{statistics:?}");
    // At least the lost one. Usually some of both disks are in flight.
    assert!(statistics.iter().any(|line| !line.contains(" resubmitted=0 ")), "{statistics:?}");
}

#[test]
fn a_guest_that_leaves_with_requests_in_flight_leaves_the_other_untouched() {
    for (leaver, socket) in SOCKETS.iter().enumerate() {
        let process = serve(&format!("size={},latency=100us,order=random,queues=4", Background::DISK), &[]);
        let [first, second] = loads(&process);
        first.progresses(200);
        let (stays, leaves) = if leaver == 0 { (second, first) } else { (first, second) };
        finish(leaves, &process);
        let from = lines(&process, "front-end disconnected");
        for _ in 0..10 {
            let mut client = client(&process, socket);
            for _ in 0..8 {
                client.rings[0].submit(Request::Read { sector: 0, bytes: 4096 });
            }
            client.rings[0].publish();
            drop(client);
            stays.progresses(50);
        }
        let mut process = process;
        process.wait_until("all have left", |process| lines(process, "front-end disconnected") >= from + 10);

        finish(stays, &process);

        assert!(!process.log().contains("stays mapped") && !process.log().contains("ERROR"), "{}", process.log());
    }
}

#[test]
fn a_hostile_guest_has_errors_of_its_own_and_cannot_reach_the_others_memory() {
    let process = serve(&format!("size={},queues=4", Background::DISK), &[]);
    let [first, second] = loads(&process);
    finish(second, &process);
    let mut hostile = client(&process, SOCKETS[1]);
    let memory = hostile.rings[0].buffers(0, 4096, Buffer::WRITABLE)[1].addr;
    // Where the device has the memory of the first guest and of this one; the ends of the address space; and where adding the
    // start of the slice would wrap around to the first guest's memory.
    let slice = 0x4000_0000_0000_u64;
    for at in [memory + slice, slice, memory.wrapping_sub(slice), u64::MAX - 4095, 0] {
        let ring = &mut hostile.rings[0];
        let slot = ring.prepare(0, 0);
        let mut chain = ring.buffers(slot, 4096, Buffer::WRITABLE);
        chain[1].addr = at;
        ring.offer(slot, &chain);
        ring.publish();
        let done = ring.wait(LIMIT).unwrap().expect("a request ends in bounded time");
        assert_eq!(done.status, IOERR, "{at:#x}");
    }
    hostile.rings[0].corrupt_ring(LIMIT).unwrap();
    first.progresses(200);

    drop(hostile);
    finish(first, &process);

    let mut process = process;
    let log = process.stop().log;
    assert!(log.contains("statistics: namespace=1 ") && !log.contains("resetting the controller"), "{log}");
    let refused: Vec<_> = log.lines().filter(|line| line.contains("request refused")).collect();
    assert!(refused.len() >= 5 && refused.iter().all(|line| line.contains("] disk 1 worker ")), "{refused:?}");
    let of_first = log.lines().find(|line| line.contains("namespace=1 reads")).unwrap();
    assert!(of_first.contains(" errors=0 "), "{of_first}");
}

#[test]
fn a_removed_drive_fails_the_requests_of_both_guests_and_the_program_ends() {
    let mut process = serve_with_faults("[[fault]]\nqueue = 1\nopcode = \"read\"\neffect = \"remove\"", "");
    let mut both = clients(&process);
    each_fails(&mut both);
    drop(both);
    assert!(process.stop().status.success());
}

fn each_fails(clients: &mut [Client; 2]) {
    for client in clients {
        let ring = &mut client.rings[0];
        ring.submit(Request::Read { sector: 0, bytes: 512 });
        ring.publish();
        let status = ring.wait(LIMIT).unwrap().expect("a request ends in bounded time").status;
        assert_ne!(status, OK);
    }
}

#[test]
fn a_change_of_one_namespace_is_that_disks_only() {
    // The second disk has queues 3 and 4.
    let faults = "[[fault]]\nqueue = 3\nopcode = \"read\"\neffect = \"resize\"\nsize = \"1M\"";
    let mut process = serve_with_faults(faults, "");
    let [mut first, mut second] = clients(&process);

    second.read(0, &mut [0; 512]).unwrap();
    process.wait_until("noticed", |process| process.log().contains("has 2048 blocks now"));

    assert!(second.read(2048, &mut [0; 512]).is_err());
    first.read(2048, &mut [0; 512]).unwrap();
    let log = process.stop().log;
    assert!(log.contains("the disk EMULATED-0_2 has 2048 blocks now"), "{log}");
    assert!(!log.contains("the disk EMULATED-0_1 "), "{log}");
}

#[test]
fn a_second_front_end_of_a_socket_is_sent_away_and_that_of_the_other_is_not() {
    let process = serve("size=1M", &[]);
    let _first = client(&process, SOCKETS[0]);

    assert!(Client::connect(&process.path(SOCKETS[0]), Shape::default()).is_err());
    assert!(Client::connect(&process.path(SOCKETS[1]), Shape::default()).is_ok());
}

#[test]
fn both_sockets_are_removed_at_the_end_and_sigusr2_hands_nothing_over() {
    let mut process = serve("size=1M", &[]);
    process.signal(rustix::process::Signal::USR2);
    process.wait_until("a warning", |process| process.log().contains("SIGUSR2: "));

    assert!(process.stop().status.success());

    assert!(SOCKETS.iter().all(|socket| !Path::exists(&process.path(socket))));
}

#[test]
fn too_little_address_space_and_too_few_queues_are_refused_with_the_numbers() {
    for (options, parts) in [
        ("width=30", ["the IOMMU allows 1G of", "less than 1G for each of 2 namespaces"]),
        ("vectors=1", ["can have 1 I/O queues", "2 namespaces need one each"]),
        ("namespaces=1", ["has no active namespace 2", "it has: 1"]),
    ] {
        let device = format!("emulated:size=1M,namespaces=2,{options}");
        let output = Process::run(&[&TWO[..], &["--device", &device]].concat());
        assert_eq!(output.status.code(), Some(1), "{options}: {}", output.log);
        let last = output.log.lines().last().unwrap();
        assert!(parts.iter().all(|part| last.contains(part)), "{options}: {last}");
    }
}

#[test]
fn a_combination_that_is_not_served_is_an_error_of_the_command_line() {
    for more in [["--kvm-socket", "/run/k"], ["--handover-socket", "/run/h"], ["--namespace", "3"]] {
        let output = Process::run(&[&TWO[..], &["--device", "emulated:namespaces=3"], &more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", output.log);
        assert!(output.log.contains(more[0]), "{more:?}: {}", output.log);
    }
}
