//! Messages in any order, and guest memory that is truncated.

use std::os::fd::AsFd;

use crate::requests::{BLK_IN, STATUS, put, read, wait_for};
use crate::rig::{Rig, copies_of, memory};
use crate::rings::{AVAIL, DESC, RAM, USED, addresses, ring_events, running};
use crate::wire::{FEATURES, MemoryRegion, NEED_REPLY, OFFERED, Reply, Wire, message, request::*, state, words};

/// Executes one request of a correct front-end; true if it succeeds.
fn works(rig: &Rig) -> bool {
    let (_wire, ram, events) = running(rig);
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);
    read::<1>(&ram, STATUS) == [0]
}

/// The number of mappings of memory files called `name` in this process.
fn mapped(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(&format!("/memfd:{name}"))).count()
}

/// A well-formed message, which may be invalid in the current state, and the indices of its descriptors: memory, kick, call.
fn any_message(number: u64) -> (Vec<u8>, Vec<usize>) {
    let [ram, kick, call] = [0, 1, 2];
    let index = u32::try_from(number >> 8 & 3).unwrap();
    let far = MemoryRegion { gpa: RAM.gpa << 12, ..RAM };
    let ring = addresses(index, RAM.qva + DESC, RAM.qva + AVAIL, RAM.qva + USED);
    let payload_of = |region: MemoryRegion| [words(&[0]), region.bytes()].concat();
    let (request, payload, with) = match number % 20 {
        0 => (GET_FEATURES, vec![], vec![]),
        1 => (SET_FEATURES, words(&[FEATURES]), vec![]),
        2 => (SET_OWNER, vec![], vec![]),
        3 => (RESET_OWNER, vec![], vec![]),
        4 => (SET_MEM_TABLE, [state(1, 0), RAM.bytes()].concat(), vec![ram]),
        5 => (SET_VRING_NUM, state(index, 8), vec![]),
        6 => (SET_VRING_ADDR, ring, vec![]),
        7 => (SET_VRING_BASE, state(index, 0), vec![]),
        8 => (GET_VRING_BASE, state(index, 0), vec![]),
        9 => (SET_VRING_KICK, words(&[index.into()]), vec![kick]),
        10 => (SET_VRING_CALL, words(&[index.into()]), vec![call]),
        11 => (SET_VRING_ERR, words(&[index.into()]), vec![call]),
        12 => (GET_PROTOCOL_FEATURES, vec![], vec![]),
        13 => (SET_PROTOCOL_FEATURES, words(&[OFFERED]), vec![]),
        14 => (SET_VRING_ENABLE, state(index, 1), vec![]),
        15 => (ADD_MEM_REG, payload_of(RAM), vec![ram]),
        16 => (ADD_MEM_REG, payload_of(far), vec![ram]),
        17 => (REM_MEM_REG, payload_of(RAM), vec![]),
        18 => (RESET_DEVICE, vec![], vec![]),
        _ => (SET_STATUS, words(&[number >> 16 & 0xf]), vec![]),
    };
    let flags = if number >> 12 & 1 == 1 { NEED_REPLY } else { 0 };
    (message(request, flags, &payload), with)
}

/// Shuts down the sending side, and reads all replies.
fn drain_replies(wire: &Wire) {
    wire.socket.shutdown(std::net::Shutdown::Write).unwrap();
    while wire.reply() != Reply::Closed {}
}

#[test]
fn messages_in_any_order_do_no_harm_and_leak_nothing() {
    let rig = Rig::new();
    assert!(works(&rig));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200 {
        let (wire, ram, events) = (rig.connect(), memory("disorder", 2 * RAM.len), ring_events());
        let fds = [ram.as_fd(), events.kick.as_fd(), events.call.as_fd()];
        for _ in 0..40 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let (bytes, with) = any_message(state);
            let with: Vec<_> = with.into_iter().map(|n| fds[n]).collect();
            wire.send_bytes(&bytes, &with);
        }
        drain_replies(&wire);
        // The next front-end is served only after the cleanup of the last one.
        rig.connect().sync();
        assert_eq!(fds.map(|fd| copies_of(fd).len()), [0; 3], "round {round}");
        assert_eq!((mapped("disorder"), rig.guest_memory()), (0, vec![]), "round {round}");
        if round % 50 == 0 {
            assert!(works(&rig), "after round {round}");
        }
    }
}

#[test]
fn a_ring_is_not_moved_while_it_runs() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let elsewhere = addresses(0, RAM.qva + 0x8000, RAM.qva + 0x9000, RAM.qva + 0xa000);

    assert_eq!(wire.call(SET_VRING_ADDR, &elsewhere, &[]), 1);

    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);
    assert_eq!(read::<1>(&ram, STATUS), [0], "it runs at its old address");
}

#[test]
fn a_front_end_that_truncates_its_memory_loses_its_ring_and_the_next_one_is_served() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.call);

    ram.set_len(0).unwrap();

    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for(&events.err);
    wire.sync();
    drop(wire);
    assert!(works(&rig));
}
