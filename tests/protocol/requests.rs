//! Requests: data from guest memory through a ring to the drive and back.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::rig::Rig;
use crate::rings::{AVAIL, DESC, RAM, USED, running};
use crate::wire::{FEATURES, Reply, Wire, request::*, state, words};

/// Offsets of header, data and status of the request in guest memory.
pub(crate) const HEADER: u64 = 0x4000;
pub(crate) const DATA: u64 = 0x5000;
pub(crate) const STATUS: u64 = 0x6000;

pub(crate) const BLK_IN: u32 = 0;
pub(crate) const BLK_OUT: u32 = 1;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// Waits for `event`. The test fails if it is not signalled within 20 s.
pub(crate) fn wait_for(event: &OwnedFd) {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "not signalled");
    rustix::io::read(event, &mut [0; 8]).unwrap();
}

/// Waits until used.idx is `index`. A ring that has run begins with a call.
pub(crate) fn wait_for_used(ram: &std::fs::File, index: u16, call: &OwnedFd) {
    while read::<2>(ram, USED + 2) != index.to_le_bytes() {
        wait_for(call);
    }
}

/// Puts one request of 512 bytes at sector 3 into ring 0, as the `number`th since the start of the ring.
pub(crate) fn put(ram: &std::fs::File, kind: u32, number: u16) {
    let write = |offset: u64, bytes: &[u8]| ram.write_all_at(bytes, offset).unwrap();
    let data_flags = if kind == BLK_IN { NEXT | WRITE } else { NEXT };
    let chain = [(HEADER, 16_u32, NEXT, 1_u16), (DATA, 512, data_flags, 2), (STATUS, 1, WRITE, 0)];
    for (slot, (at, len, flags, next)) in (0..).zip(chain) {
        let words = [&(RAM.gpa + at).to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        write(DESC + slot * 16, &words.concat());
    }
    write(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &3_u64.to_le_bytes()].concat());
    write(STATUS, &[0xff]);
    // EVENT_IDX: request a call for this request.
    write(AVAIL + 4 + 2 * 8, &number.to_le_bytes());
    write(AVAIL + 4 + 2 * u64::from(number % 8), &0_u16.to_le_bytes());
    write(AVAIL + 2, &(number + 1).to_le_bytes());
}

pub(crate) fn read<const N: usize>(ram: &std::fs::File, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn data_written_by_one_guest_is_read_by_the_next() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let pattern: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
    ram.write_all_at(&pattern, DATA).unwrap();
    put(&ram, BLK_OUT, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);
    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert_eq!(read::<2>(&ram, USED + 2), [1, 0]);
    drop(wire);

    let (wire, ram, events) = running(&rig);
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);

    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert_eq!(read::<512>(&ram, DATA).to_vec(), pattern);
    assert_eq!(wire.stop_ring(0), 1, "one request has been taken");
}

#[test]
fn a_request_waits_in_a_disabled_ring_and_survives_a_stop() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 0), &[]), 0);
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    assert_eq!(wire.stop_ring(0), 0, "not taken");
    assert_eq!(read::<1>(&ram, STATUS), [0xff]);

    // Neither is the call descriptor sent again nor the kick signalled again: the request is found when the ring starts.
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    wait_for(&events.call);

    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert_eq!(wire.stop_ring(0), 1);
}

#[test]
fn memory_can_grow_and_shrink_under_a_running_ring() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let dimm = crate::rig::memory("dimm", 1 << 20);
    let place = crate::wire::MemoryRegion { gpa: 1 << 32, len: 1 << 20, qva: 1 << 45, offset: 0 };
    for number in 0..20 {
        put(&ram, BLK_IN, number);
        rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
        let changed = if number % 2 == 0 { wire.add_region(place, dimm.as_fd()) } else { wire.remove_region(place) };
        assert_eq!(changed, 0);
        wait_for(&events.call);
        assert_eq!(read::<1>(&ram, STATUS), [0]);
    }
    assert_eq!(wire.stop_ring(0), 20);
}

#[test]
fn descriptors_replaced_while_the_ring_runs_are_used_from_then_on() {
    let rig = Rig::new();
    let (wire, ram, old) = running(&rig);
    let fresh = crate::rings::ring_events();
    assert_eq!(wire.call(SET_VRING_CALL, &words(&[0]), &[fresh.call.as_fd()]), 0);
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[fresh.kick.as_fd()]), 0);

    put(&ram, BLK_IN, 0);
    rustix::io::write(&fresh.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&fresh.call);

    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert!(rustix::io::read(&old.call, &mut [0; 8]).is_err(), "the old one is not signalled");
}

/// The byte `writeback` of configuration space.
fn writeback(wire: &Wire) -> u8 {
    wire.send(GET_CONFIG, &[state(32, 1), vec![0; 5]].concat(), &[]);
    match wire.reply() {
        Reply::Message(GET_CONFIG, payload) => payload[12],
        other => panic!("expected configuration space, got {other:?}"),
    }
}

#[test]
fn the_driver_switches_the_write_cache_and_it_is_off_without_flush() {
    const FLUSH: u64 = 1 << 9;
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let without = wire.call(SET_FEATURES, &words(&[FEATURES & !FLUSH]), &[]);
    assert_eq!((without, writeback(&wire)), (0, 0), "completed writes must be durable");
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES | FLUSH]), &[]), 0);
    assert_eq!(writeback(&wire), 1, "the drive's initial setting");

    for value in [0, 0, 1, 0] {
        assert_eq!(wire.call(SET_CONFIG, &[state(32, 1), vec![0, 0, 0, 0, value]].concat(), &[]), 0);
        assert_eq!(writeback(&wire), value);
    }

    assert_eq!(wire.call(SET_STATUS, &words(&[0]), &[]), 0);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES | FLUSH]), &[]), 0);
    assert_eq!(writeback(&wire), 1, "a reset restores it");
}
