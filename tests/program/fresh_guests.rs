//! Requests in flight belong to the guest that submitted them, and end with it. What comes after it, a new guest or the same one
//! after a reset, finds its memory untouched.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Signal;
use testbed::client::{Guest, Region, Request, Shape};

use crate::process::{LIMIT, Process};

const OPTIONS: &str = "size=16M,latency=50ms,order=random";
/// By then every request that the drive has, has completed.
const ALL_COMPLETED: Duration = Duration::from_millis(300);

fn shapes() -> [Shape; 2] {
    [false, true].map(|packed| Shape { queues: 2, depth: 32, bytes: 4096, packed, ..Shape::default() })
}

/// Fails only after some attempts, as [`Process::client_of`] does, and because the one before may still be drained.
fn connect(process: &Process, guest: &mut Guest) {
    for _ in 0..100 {
        let connected = UnixStream::connect(process.path("socket"));
        if connected.is_ok_and(|socket| guest.connect(socket).is_ok()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("no session; its log:\n{}", process.log());
}

/// Fills both rings with reads that take a while, and waits until one of each has completed: the others are in flight.
fn submit(guest: &mut Guest) {
    for ring in &mut guest.rings {
        while ring.has_room() {
            ring.submit(Request::Read { sector: 0, bytes: 4096 });
        }
        ring.publish();
    }
    for ring in &mut guest.rings {
        ring.wait(LIMIT).unwrap().expect("in time");
    }
}

fn guest_with_requests_in_flight(process: &Process, shape: Shape) -> Guest {
    let mut guest = Guest::new(shape, Region::Kept).unwrap();
    connect(process, &mut guest);
    submit(&mut guest);
    guest
}

fn memory(guest: &Guest) -> Vec<Vec<u8>> {
    guest.rings.iter().map(testbed::client::Ring::requests_memory).collect()
}

/// Fails if anything completes that this guest has not submitted, or if its memory changes.
fn assert_untouched(process: &Process, guest: &mut Guest, before: &[Vec<u8>]) {
    std::thread::sleep(ALL_COMPLETED);
    for ring in &mut guest.rings {
        assert!(ring.try_reap().is_none(), "a request completed that was never submitted; its log:\n{}", process.log());
    }
    assert!(memory(guest) == before, "the memory of the guest has been written to; its log:\n{}", process.log());
}

fn assert_served(process: &Process, guest: &mut Guest) {
    for ring in &mut guest.rings {
        let slot = ring.submit(Request::Read { sector: 8, bytes: 4096 });
        ring.publish();
        let done = ring.wait(LIMIT).unwrap();
        let done = done.unwrap_or_else(|| panic!("a request does not complete; its log:\n{}", process.log()));
        assert_eq!((done.slot, done.status), (slot, 0));
        assert!(ring.is_idle() && ring.try_reap().is_none());
    }
}

#[test]
fn a_new_guest_gets_nothing_of_the_requests_that_a_dead_one_had_in_flight() {
    for shape in shapes() {
        for region in [Region::Kept, Region::None] {
            let process = Process::serve(OPTIONS);
            let mut old = guest_with_requests_in_flight(&process, shape);
            old.disconnect();
            let mut new = Guest::new(shape, region).unwrap();
            let before = memory(&new);

            connect(&process, &mut new);

            assert_untouched(&process, &mut new, &before);
            assert_served(&process, &mut new);
        }
    }
}

#[test]
fn a_new_guest_gets_nothing_of_the_requests_of_one_that_died_with_the_program() {
    for shape in shapes() {
        let mut first = Process::serve(OPTIONS);
        let old = guest_with_requests_in_flight(&first, shape);
        first.signal(Signal::KILL);
        first.wait_for_exit();
        drop(old);
        let second = Process::serve(OPTIONS);
        let mut new = Guest::new(shape, Region::Kept).unwrap();
        let before = memory(&new);

        connect(&second, &mut new);

        assert_untouched(&second, &mut new, &before);
        assert_served(&second, &mut new);
    }
}

#[test]
fn nothing_old_comes_back_after_a_guest_resets_the_device_and_the_region_is_kept() {
    for shape in shapes() {
        let process = Process::serve(OPTIONS);
        let mut guest = guest_with_requests_in_flight(&process, shape);
        guest.stop().unwrap();
        guest.reset_and_start().unwrap();
        let before = vec![vec![0; memory(&guest)[0].len()]; shape.queues];

        assert_untouched(&process, &mut guest, &before);

        assert_served(&process, &mut guest);
    }
}

#[test]
fn nothing_old_comes_back_if_the_guest_resets_the_device_while_the_program_is_dead() {
    for shape in shapes() {
        for dropped in [false, true] {
            let mut first = Process::serve(OPTIONS);
            let mut guest = guest_with_requests_in_flight(&first, shape);
            first.signal(Signal::KILL);
            first.wait_for_exit();
            guest.disconnect();
            guest.reset().unwrap();
            if dropped {
                guest.drop_region();
            }
            let before = memory(&guest);
            let second = Process::serve(OPTIONS);

            connect(&second, &mut guest);

            assert_untouched(&second, &mut guest, &before);
            if dropped {
                assert_served(&second, &mut guest);
            }
        }
    }
}
