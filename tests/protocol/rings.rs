//! Set-up, start, stop and reset of a ring by messages.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use crate::requests::{BLK_IN, put, wait_for};
use crate::rig::{QUEUES, Rig, event, memory};
use crate::wire::{FEATURES, MemoryRegion, Reply, Wire, request::*, state, words};

/// Guest memory of these tests: 1 MiB at 1 MiB, mapped by the front-end at 2^46.
pub(crate) const RAM: MemoryRegion = MemoryRegion { gpa: 1 << 20, len: 1 << 20, qva: 1 << 46, offset: 0 };

/// Offsets of the parts of ring 0 in [`RAM`].
pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x3000;

pub(crate) fn addresses(index: u32, desc: u64, avail: u64, used: u64) -> Vec<u8> {
    [state(index, 0), words(&[desc, used, avail, 0])].concat()
}

/// The eventfds of a ring.
pub(crate) struct RingEvents {
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) err: OwnedFd,
}

/// The messages that set up ring 0, except for SET_VRING_ENABLE.
pub(crate) fn setup_messages(events: &RingEvents) -> Vec<(u32, Vec<u8>, Vec<&OwnedFd>)> {
    let ring = addresses(0, RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED);
    vec![
        (SET_VRING_NUM, state(0, 8), vec![]),
        (SET_VRING_BASE, state(0, 0), vec![]),
        (SET_VRING_ADDR, ring, vec![]),
        (SET_VRING_KICK, words(&[0]), vec![&events.kick]),
        (SET_VRING_CALL, words(&[0]), vec![&events.call]),
        (SET_VRING_ERR, words(&[0]), vec![&events.err]),
    ]
}

pub(crate) fn ring_events() -> RingEvents {
    RingEvents { kick: event(), call: event(), err: event() }
}

pub(crate) fn send_all(wire: &Wire, messages: &[(u32, Vec<u8>, Vec<&OwnedFd>)]) {
    for (request, payload, fds) in messages {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        assert_eq!(wire.call(*request, payload, &fds), 0, "request {request}");
    }
}

/// A front-end with memory and a running ring 0.
pub(crate) fn running(rig: &Rig) -> (Wire, File, RingEvents) {
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    (wire, ram, events)
}

#[test]
fn a_ring_can_be_set_up_in_any_order() {
    let rig = Rig::new();
    for first in 0..6 {
        for reversed in [false, true] {
            let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
            wire.negotiate();
            let mut messages = setup_messages(&events);
            messages.rotate_left(first);
            if reversed {
                messages.reverse();
            }
            assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
            send_all(&wire, &messages);
            assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
            assert_eq!(wire.call(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
            assert_eq!(wire.stop_ring(0), 0);
        }
    }
}

#[test]
fn a_ring_enabled_before_its_setup_starts_when_it_is_complete() {
    let rig = Rig::new();
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate();
    for index in 0..QUEUES.into() {
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(index, 1), &[]), 0, "ring {index} is not set up");
    }
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
}

#[test]
fn without_protocol_features_a_ring_starts_with_its_kick() {
    let rig = Rig::new();
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.get(GET_FEATURES);
    wire.send(SET_FEATURES, &words(&[FEATURES & !(1 << 30)]), &[]);
    let table = [state(1, 0), RAM.bytes()].concat();
    wire.send(SET_MEM_TABLE, &table, &[ram.as_fd()]);
    for (request, payload, fds) in setup_messages(&events) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        wire.send(request, &payload, &fds);
    }
    // There are no acknowledgements without protocol features. The base stays 0 only if the ring runs.
    wire.send(SET_VRING_BASE, &state(0, 5), &[]);
    assert_eq!(wire.stop_ring(0), 0);
}

#[test]
fn enabling_a_ring_without_memory_is_refused_and_the_ring_starts_when_memory_is_added() {
    let rig = Rig::new();
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate();
    send_all(&wire, &setup_messages(&events));

    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "no memory");
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);

    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 5), &[]), 1, "refused: the ring runs");
}

#[test]
fn a_ring_outside_memory_or_across_its_end_is_refused() {
    let rig = Rig::new();
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    send_all(&wire, &setup_messages(&events));
    let good = [RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED];
    let end = RAM.qva + RAM.len;
    for (part, address) in [(0, end - 0x10), (1, end - 0x10), (2, end - 0x10), (0, 0x1000), (2, end), (1, u64::MAX - 1)]
    {
        let mut at = good;
        at[part] = address;
        assert_eq!(wire.call(SET_VRING_ADDR, &addresses(0, at[0], at[1], at[2] & !3), &[]), 0);
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "part {part} at {address:#x}");
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 0), &[]), 0);
    }
}

#[test]
fn stopping_returns_the_base_and_needs_a_new_kick() {
    let rig = Rig::new();
    let (wire, _ram, events) = running(&rig);
    assert_eq!(wire.stop_ring(0), 0);

    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 5), &[]), 0, "stopped");
    assert_eq!(wire.stop_ring(0), 5, "a second stop returns the base again");
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0), &[]), 1, "it runs again");
}

#[test]
fn an_unused_ring_has_base_0() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(wire.stop_ring(3), 0);
}

#[test]
fn get_vring_base_of_a_ring_that_does_not_exist_ends_the_connection() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    wire.send(GET_VRING_BASE, &state(QUEUES.into(), 0), &[]);
    assert_eq!(wire.reply(), Reply::Closed, "the reply has no error code");
}

#[test]
fn descriptors_can_be_replaced_while_the_ring_runs() {
    let rig = Rig::new();
    let (wire, _ram, _events) = running(&rig);
    let fresh = event();
    for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
        assert_eq!(wire.call(request, &words(&[0]), &[fresh.as_fd()]), 0);
        assert_eq!(wire.call(request, &words(&[0x100]), &[]), 0, "no descriptor: polled");
    }
}

#[test]
fn a_descriptor_that_is_not_an_eventfd_is_refused_and_the_one_before_it_stays() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let (reader, writer) = rustix::pipe::pipe().unwrap();

    for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
        for other in [reader.as_fd(), writer.as_fd(), memory("no eventfd", 4096).as_fd()] {
            assert_eq!(wire.call(request, &words(&[0]), &[other]), 1, "request {request}");
        }
    }
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();

    wait_for(&events.call);
}

#[test]
fn a_reset_stops_rings_and_is_allowed_at_any_time() {
    let rig = Rig::new();
    let idle = rig.connect();
    idle.negotiate();
    for _ in 0..3 {
        assert_eq!(idle.call(RESET_DEVICE, &[], &[]), 0);
    }
    drop(idle);
    for reset in [RESET_DEVICE, RESET_OWNER, SET_STATUS] {
        let (wire, _ram, events) = running(&rig);
        let payload = if reset == SET_STATUS { words(&[0]) } else { vec![] };

        assert_eq!(wire.call(reset, &payload, &[]), 0);

        assert_eq!(wire.call(SET_VRING_BASE, &state(0, 5), &[]), 0, "stopped");
        assert_eq!(wire.stop_ring(0), 5);
        assert_eq!(rig.guest_memory(), [(RAM.gpa, RAM.len)], "memory stays mapped");
        send_all(&wire, &setup_messages(&events));
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "features must be negotiated again");
        assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);
        assert_eq!(wire.call(SET_VRING_NUM, &state(0, 16), &[]), 1, "it runs again");
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
    assert_eq!(wire.call(SET_STATUS, &words(&[0]), &[]), 0);
    assert_eq!(wire.get(GET_STATUS), 0);
}
