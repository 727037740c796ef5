//! With `GPA_ADDRESSES`, addresses of rings and regions are guest-physical; without, they are the front-end's own.

use std::os::fd::AsFd;

use crate::requests::{BLK_IN, STATUS, put, read, wait_for};
use crate::rig::{Rig, memory};
use crate::rings::{AVAIL, DESC, RAM, USED, addresses, ring_events, send_all, setup_messages};
use crate::wire::{FEATURES, GPA_ADDRESSES, MemoryRegion, PROTOCOL, request::*, state};

#[test]
fn the_acknowledged_bit_decides_which_addresses_are_valid() {
    let rig = Rig::new();
    for (protocol, valid) in [(PROTOCOL, RAM.qva), (PROTOCOL | GPA_ADDRESSES, RAM.gpa)] {
        let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
        wire.negotiate_with(FEATURES, protocol);
        assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
        send_all(&wire, &setup_messages(&events));
        for start in [RAM.qva, RAM.gpa] {
            let ring = addresses(0, start + DESC, start + AVAIL, start + USED);
            assert_eq!(wire.call(SET_VRING_ADDR, &ring, &[]), 0);
            let ack = wire.call(SET_VRING_ENABLE, &state(0, 1), &[]);
            assert_eq!(ack, u64::from(start != valid), "{start:#x} under {protocol:#x}");
            if ack == 0 {
                put(&ram, BLK_IN, 0);
                rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
                wait_for(&events.call);
                assert_eq!(read::<1>(&ram, STATUS), [0]);
                assert_eq!(wire.stop_ring(0), 1);
                break;
            }
            assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 0), &[]), 0);
        }
    }
}

#[test]
fn front_end_addresses_of_regions_are_ignored() {
    let rig = Rig::new();
    let (wire, ram) = (rig.connect(), memory("ram", 3 * RAM.len));
    wire.negotiate_with(FEATURES, PROTOCOL | GPA_ADDRESSES);
    let region = |n: u64| MemoryRegion { gpa: n * RAM.len, qva: 0, len: RAM.len, offset: n * RAM.len };
    for n in 0..3 {
        assert_eq!(wire.add_region(region(n), ram.as_fd()), 0);
    }
    assert_eq!(wire.remove_region(MemoryRegion { qva: 77 << 12, ..region(1) }), 0);
    assert_eq!(rig.guest_memory(), [(0, RAM.len), (2 * RAM.len, RAM.len)]);
}
