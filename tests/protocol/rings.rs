//! The life of a ring as messages shape it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use crate::rig::{QUEUES, Rig, event, memory};
use crate::wire::{FEATURES, Place, Reply, Wire, request::*, state, words};

/// Guest memory of these tests: 1 MiB at 1 MiB, seen by the front-end at 2^46.
pub(crate) const RAM: Place = Place { gpa: 1 << 20, len: 1 << 20, qva: 1 << 46, offset: 0 };

/// Where ring 0 lies, as offsets into [`RAM`].
pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;

pub(crate) fn addresses(index: u32, desc: u64, avail: u64, used: u64) -> Vec<u8> {
    [state(index, 0), words(&[desc, used, avail, 0])].concat()
}

/// What the front-end holds of a ring.
pub(crate) struct Ends {
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) err: OwnedFd,
}

/// The parts of setting a ring up, each acknowledged.
pub(crate) fn steps(ends: &Ends) -> Vec<(u32, Vec<u8>, Vec<&OwnedFd>)> {
    let ring = addresses(0, RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED);
    vec![
        (SET_VRING_NUM, state(0, 8), vec![]),
        (SET_VRING_BASE, state(0, 0), vec![]),
        (SET_VRING_ADDR, ring, vec![]),
        (SET_VRING_KICK, words(&[0]), vec![&ends.kick]),
        (SET_VRING_CALL, words(&[0]), vec![&ends.call]),
        (SET_VRING_ERR, words(&[0]), vec![&ends.err]),
    ]
}

pub(crate) fn ends() -> Ends {
    Ends { kick: event(), call: event(), err: event() }
}

pub(crate) fn send_all(wire: &Wire, steps: &[(u32, Vec<u8>, Vec<&OwnedFd>)]) {
    for (request, payload, fds) in steps {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        assert_eq!(wire.ask(*request, payload, &fds), 0, "request {request}");
    }
}

/// A front-end with memory and a running ring 0.
pub(crate) fn running(rig: &Rig) -> (Wire, File, Ends) {
    let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
    wire.negotiate();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &steps(&ends));
    assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    (wire, ram, ends)
}

#[test]
fn a_ring_can_be_set_up_in_any_order() {
    let rig = Rig::new();
    for turn in 0..6 {
        for backwards in [false, true] {
            let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
            wire.negotiate();
            let mut steps = steps(&ends);
            steps.rotate_left(turn);
            if backwards {
                steps.reverse();
            }
            assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
            send_all(&wire, &steps);
            assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
            assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
            assert_eq!(wire.stop_ring(0), 0);
        }
    }
}

#[test]
fn a_ring_enabled_before_there_is_anything_starts_when_it_is_complete() {
    let rig = Rig::new();
    let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
    wire.negotiate();
    for index in 0..QUEUES.into() {
        assert_eq!(wire.ask(SET_VRING_ENABLE, &state(index, 1), &[]), 0, "nothing is known of ring {index}");
    }
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &steps(&ends));
    assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
}

#[test]
fn without_protocol_features_a_ring_starts_with_its_kick() {
    let rig = Rig::new();
    let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
    wire.get(GET_FEATURES);
    wire.send(SET_FEATURES, &words(&[FEATURES & !(1 << 30)]), &[]);
    let table = [state(1, 0), RAM.bytes()].concat();
    wire.send(SET_MEM_TABLE, &table, &[ram.as_fd()]);
    for (request, payload, fds) in steps(&ends) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        wire.send(request, &payload, &fds);
    }
    // Nothing is acknowledged in this conversation; a base that is not taken shows that the ring runs.
    wire.send(SET_VRING_BASE, &state(0, 5), &[]);
    assert_eq!(wire.stop_ring(0), 0);
}

#[test]
fn a_kick_without_memory_is_refused_and_the_ring_starts_when_memory_comes() {
    let rig = Rig::new();
    let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
    wire.negotiate();
    send_all(&wire, &steps(&ends));

    assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "no memory");
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);

    assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
}

#[test]
fn a_ring_outside_memory_or_across_its_end_is_refused() {
    let rig = Rig::new();
    let (wire, ram, ends) = (rig.connect(), memory("ram", RAM.len), ends());
    wire.negotiate();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &steps(&ends));
    let good = [RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED];
    let end = RAM.qva + RAM.len;
    for (part, address) in [(0, end - 0x10), (1, end - 0x10), (2, end - 0x10), (0, 0x1000), (2, end), (1, u64::MAX - 1)]
    {
        let mut at = good;
        at[part] = address;
        assert_eq!(wire.ask(SET_VRING_ADDR, &addresses(0, at[0], at[1], at[2] & !3), &[]), 0);
        assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "part {part} at {address:#x}");
        assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 0), &[]), 0);
    }
}

#[test]
fn stopping_returns_the_base_and_needs_a_new_kick() {
    let rig = Rig::new();
    let (wire, _ram, ends) = running(&rig);
    assert_eq!(wire.stop_ring(0), 0);

    assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 5), &[]), 0, "stopped");
    assert_eq!(wire.stop_ring(0), 5, "stopping twice tells the base again");
    assert_eq!(wire.ask(SET_VRING_KICK, &words(&[0]), &[ends.kick.as_fd()]), 0);
    assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 0), &[]), 1, "it runs again");
}

#[test]
fn a_ring_never_used_has_its_base() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.stop_ring(3), 0);
}

#[test]
fn the_base_of_a_ring_that_does_not_exist_ends_the_conversation() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    wire.send(GET_VRING_BASE, &state(QUEUES.into(), 0), &[]);
    assert_eq!(wire.reply(), Reply::Closed, "there is no way to say no");
}

#[test]
fn descriptors_can_be_exchanged_while_the_ring_runs() {
    let rig = Rig::new();
    let (wire, _ram, _ends) = running(&rig);
    let fresh = event();
    for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
        assert_eq!(wire.ask(request, &words(&[0]), &[fresh.as_fd()]), 0);
        assert_eq!(wire.ask(request, &words(&[0x100]), &[]), 0, "no descriptor: polled");
    }
}

#[test]
fn a_reset_stops_rings_and_is_harmless_at_any_time() {
    let rig = Rig::new();
    let idle = rig.connect();
    idle.negotiate();
    for _ in 0..3 {
        assert_eq!(idle.ask(RESET_DEVICE, &[], &[]), 0);
    }
    drop(idle);
    for reset in [RESET_DEVICE, RESET_OWNER, SET_STATUS] {
        let (wire, _ram, ends) = running(&rig);
        let payload = if reset == SET_STATUS { words(&[0]) } else { vec![] };

        assert_eq!(wire.ask(reset, &payload, &[]), 0);

        assert_eq!(wire.ask(SET_VRING_BASE, &state(0, 5), &[]), 0, "stopped");
        assert_eq!(wire.stop_ring(0), 5);
        assert_eq!(rig.guest_memory(), [(RAM.gpa, RAM.len)], "memory stays");
        send_all(&wire, &steps(&ends));
        assert_eq!(wire.ask(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "features are to be agreed on again");
        assert_eq!(wire.ask(SET_FEATURES, &words(&[FEATURES]), &[]), 0);
        assert_eq!(wire.ask(SET_VRING_NUM, &state(0, 16), &[]), 1, "it runs again");
    }
}

#[test]
fn the_status_is_what_the_driver_wrote() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.get(GET_STATUS), 0);
    for status in [1, 3, 0xb, 0xf] {
        wire.send(SET_STATUS, &words(&[status]), &[]);
        assert_eq!(wire.get(GET_STATUS), status);
    }
    assert_eq!(wire.ask(SET_STATUS, &words(&[0]), &[]), 0);
    assert_eq!(wire.get(GET_STATUS), 0);
}
