//! Packed rings: the meaning of their messages, and data transfers across stops and restarts.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use testbed::kept_log::{keep_log, lines_with};
use testbed::own_process::in_own_process;
use vhost_device_vfio::vhost_user::VirtioFeatures;

use crate::requests::{BLK_IN, BLK_OUT, DATA, HEADER, NEXT, STATUS, WRITE, read, wait_for};
use crate::rig::{Environment, Rig, memory};
use crate::rings::{AVAIL, DESC, RAM, RingEvents, USED, addresses, ring_events};
use crate::wire::{FEATURES, PROTOCOL, RING_PACKED, Wire, request::*, state, words};

/// Not a power of two, and not a multiple of the three descriptors of a request.
pub(crate) const SIZE: u32 = 7;
const AVAILABLE: u16 = 0x80;
const IS_USED: u16 = 0x8000;

/// A front-end with memory and a ring 0 that is set up, but not enabled and without a base.
fn prepared(rig: &Rig) -> (Wire, File, RingEvents) {
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate_with(FEATURES | RING_PACKED, PROTOCOL);
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    assert_eq!(wire.call(SET_VRING_NUM, &state(0, SIZE), &[]), 0);
    let ring = addresses(0, RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED);
    assert_eq!(wire.call(SET_VRING_ADDR, &ring, &[]), 0);
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
    assert_eq!(wire.call(SET_VRING_CALL, &words(&[0]), &[events.call.as_fd()]), 0);
    (wire, ram, events)
}

/// The slot and the wrap counter of descriptor number `count` since the start.
fn place(count: u64) -> (u64, bool) {
    (count % u64::from(SIZE), (count / u64::from(SIZE)).is_multiple_of(2))
}

/// The base after `count` descriptors, with both halves equal.
fn base(count: u64) -> u32 {
    let (slot, wrap) = place(count);
    let half = u32::try_from(slot).unwrap() | if wrap { 0x8000 } else { 0 };
    half | half << 16
}

/// The buffer ID of request `number`.
fn id(number: u64) -> u16 {
    u16::try_from(0x100 + number).unwrap()
}

/// Makes one request of 512 bytes at sector 3 available, as the `number`th since the beginning.
pub(crate) fn put(ram: &File, kind: u32, number: u64) {
    let write = |offset: u64, bytes: &[u8]| ram.write_all_at(bytes, offset).unwrap();
    write(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &3_u64.to_le_bytes()].concat());
    write(STATUS, &[0xff]);
    let data_flags = if kind == BLK_IN { NEXT | WRITE } else { NEXT };
    let chain = [(HEADER, 16_u32, NEXT), (DATA, 512, data_flags), (STATUS, 1, WRITE)];
    for (n, (at, len, flags)) in (0..3_u32).zip(chain).rev() {
        let (slot, wrap) = place(3 * number + u64::from(n));
        let flags = flags | if wrap { AVAILABLE } else { IS_USED };
        let id = id(number);
        let words = [&(RAM.gpa + at).to_le_bytes()[..], &len.to_le_bytes(), &id.to_le_bytes(), &flags.to_le_bytes()];
        write(DESC + slot * 16, &words.concat());
    }
}

/// True if request `number` is marked used.
pub(crate) fn is_used(ram: &File, number: u64) -> bool {
    let (slot, wrap) = place(3 * number);
    let [_, _, _, _, id_low, id_high, low, high] = read::<8>(ram, DESC + slot * 16 + 8);
    assert_eq!(u16::from_le_bytes([id_low, id_high]), id(number));
    u16::from_le_bytes([low, high]) & (AVAILABLE | IS_USED) == if wrap { AVAILABLE | IS_USED } else { 0 }
}

#[test]
fn data_is_transferred_through_a_ring_that_is_stopped_after_each_request() {
    let rig = Rig::new();
    let (wire, ram, events) = prepared(&rig);
    let pattern: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
    ram.write_all_at(&pattern, DATA).unwrap();
    for number in 0..12 {
        put(&ram, if number == 0 { BLK_OUT } else { BLK_IN }, number);
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
        rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
        // A ring that has run begins with a call.
        while !is_used(&ram, number) {
            wait_for(&events.call);
        }
        assert_eq!(read::<1>(&ram, STATUS), [0]);
        assert_eq!(read::<512>(&ram, DATA).to_vec(), pattern, "request {number}");
        ram.write_all_at(&[0xee; 512], DATA).unwrap();

        let next = base(3 * (number + 1));
        assert_eq!(wire.stop_ring(0), next);
        // The ring continues where it was stopped, whether a base is set or not. DPDK sets only the available half.
        match number % 3 {
            0 => assert_eq!(wire.call(SET_VRING_BASE, &state(0, next), &[]), 0),
            1 => assert_eq!(wire.call(SET_VRING_BASE, &state(0, next & 0xffff), &[]), 0),
            _ => {}
        }
        assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
    }
}

#[test]
fn an_unused_ring_has_both_wrap_counters_set() {
    let rig = Rig::new();
    let (wire, _ram, _events) = prepared(&rig);
    assert_eq!(wire.stop_ring(0), 0x8000_8000);
    assert_eq!(wire.stop_ring(3), 0x8000_8000);
}

#[test]
fn a_new_ring_that_starts_at_base_zero_is_warned_of_and_one_that_stopped_there_is_not() {
    if !in_own_process("packed::a_new_ring_that_starts_at_base_zero_is_warned_of_and_one_that_stopped_there_is_not") {
        return;
    }
    keep_log();
    let start_at = |wire: &Wire, events: &RingEvents, base| {
        assert_eq!(wire.call(SET_VRING_BASE, &state(0, base), &[]), 0);
        assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    };
    let (right, wrong) = (Rig::new(), Rig::new());

    let (wire, _ram, events) = prepared(&right);
    start_at(&wire, &events, 0x8000_8000);
    assert_eq!(lines_with("SET_VRING_BASE 0"), 0);
    let (wire, _ram, events) = prepared(&wrong);
    start_at(&wire, &events, 0);
    assert_eq!(lines_with("virtqueue 0: SET_VRING_BASE 0 for a packed ring"), 1);
    assert_eq!(wire.stop_ring(0), 0);
    start_at(&wire, &events, 0);

    assert_eq!(lines_with("SET_VRING_BASE 0"), 1, "it was stopped there");
}

#[test]
fn a_packed_ring_that_is_not_offered_is_refused() {
    let rig = Rig::with(Environment { withheld: VirtioFeatures::RING_PACKED, ..Environment::default() });
    let wire = rig.connect();
    let offered = wire.get(GET_FEATURES);

    assert_eq!(offered & RING_PACKED, 0);
    assert_eq!(offered & FEATURES, FEATURES);
    wire.negotiate();
    assert_ne!(wire.call(SET_FEATURES, &words(&[FEATURES | RING_PACKED]), &[]), 0);
}

#[test]
fn a_base_outside_the_ring_is_refused_when_the_ring_is_enabled() {
    let rig = Rig::new();
    let (wire, _ram, _events) = prepared(&rig);
    for wrong in [0x8007_8000, 0x8000_8007, 0x8001_8000, 0xffff_ffff] {
        assert_eq!(wire.call(SET_VRING_BASE, &state(0, wrong), &[]), 0);
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1, "{wrong:#x}");
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 0), &[]), 0);
    }
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0x0006_0006), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
}

#[test]
fn parts_are_aligned_to_sixteen_four_and_four() {
    let rig = Rig::new();
    let (wire, _ram, _events) = prepared(&rig);
    // The codec refuses what is misaligned for both layouts. A split avail ring may be at any even address.
    let (desc, avail, used) = (RAM.qva + DESC, RAM.qva + AVAIL + 2, RAM.qva + USED);
    assert_eq!(wire.call(SET_VRING_ADDR, &addresses(0, desc, avail, used), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1);
    // The two event suppression structures have four bytes each.
    let end = RAM.qva + RAM.len;
    assert_eq!(wire.call(SET_VRING_ADDR, &addresses(0, RAM.qva + DESC, end - 4, end - 8), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
}

#[test]
fn every_size_up_to_1024_is_accepted() {
    let rig = Rig::new();
    let (wire, _ram, _events) = prepared(&rig);
    for (size, expected) in [(1, 0), (3, 0), (1000, 0), (1023, 0), (1024, 0), (0, 1), (1025, 1), (0x1_0007, 1)] {
        assert_eq!(wire.call(SET_VRING_NUM, &state(0, size), &[]), expected, "{size}");
    }
}

#[test]
fn a_size_is_checked_again_when_the_layout_is_known() {
    let rig = Rig::new();
    let (wire, _ram, _events) = prepared(&rig);
    // The ring has seven entries when the driver acknowledges split rings only.
    assert_eq!(wire.call(RESET_DEVICE, &[], &[]), 0);
    assert_eq!(wire.call(SET_VRING_NUM, &state(0, 7), &[]), 0);
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0), &[]), 0);
    let ring = addresses(0, RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED);
    assert_eq!(wire.call(SET_VRING_ADDR, &ring, &[]), 0);
    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0x100]), &[]), 0);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 1);
    assert_eq!(wire.call(SET_VRING_NUM, &state(0, 8), &[]), 0, "this starts it");
}
