//! Messages that no front-end should send, and what becomes of each: a refusal, or the end of the conversation. After
//! either, the server serves the next front-end as if nothing had been.

use std::os::fd::{AsFd, BorrowedFd};

use crate::rig::{Rig, event, memory};
use crate::wire::{FEATURES, NEED_REPLY, PROTOCOL, MemoryRegion, Reply, Wire, message, request::*, state, words};

/// What the sender of a bad message is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// A reply with the code that means failure.
    No,
    /// Nothing: the conversation ends.
    Goodbye,
}

use Told::{Goodbye, No};

fn told(wire: &Wire) -> Told {
    match wire.reply() {
        Reply::Closed => Goodbye,
        Reply::Message(_, payload) if payload == words(&[1]) => No,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_is_answered_or_ends_the_conversation() {
    let table: Vec<(&str, Told, Vec<u8>)> = vec![
        ("version 0", Goodbye, [&GET_FEATURES.to_ne_bytes()[..], &[0; 8]].concat()),
        ("version 2", Goodbye, [&GET_FEATURES.to_ne_bytes()[..], &2_u32.to_ne_bytes(), &[0; 4]].concat()),
        ("a reply", Goodbye, message(GET_FEATURES, 4, &[])),
        ("reserved flags", Goodbye, message(GET_FEATURES, 0x10, &[])),
        ("request 0", Goodbye, message(0, 0, &[])),
        ("request 45", Goodbye, message(45, NEED_REPLY, &[])),
        ("an oversized one", Goodbye, message(SET_CONFIG, 0, &[0; 4097])),
        ("an announcement of 4 GiB", Goodbye, [SET_CONFIG, 1, u32::MAX].map(u32::to_ne_bytes).concat()),
        ("a payload where none belongs", Goodbye, message(GET_FEATURES, 0, &[0; 8])),
        ("too short", Goodbye, message(SET_FEATURES, NEED_REPLY, &[0; 4])),
        ("too long", Goodbye, message(SET_VRING_NUM, NEED_REPLY, &[0; 12])),
        ("a feature not offered", No, message(SET_FEATURES, NEED_REPLY, &words(&[FEATURES | 1 << 33]))),
        (
            "a protocol feature not offered",
            No,
            message(SET_PROTOCOL_FEATURES, NEED_REPLY, &words(&[PROTOCOL | 1 << 12])),
        ),
        ("a ring that does not exist", No, message(SET_VRING_NUM, NEED_REPLY, &state(99, 8))),
        ("a ring far away", No, message(SET_VRING_BASE, NEED_REPLY, &state(u32::MAX, 0))),
        ("a size that is no power of two", No, message(SET_VRING_NUM, NEED_REPLY, &state(0, 100))),
        ("no size at all", No, message(SET_VRING_NUM, NEED_REPLY, &state(0, 0))),
        ("too large a ring", No, message(SET_VRING_NUM, NEED_REPLY, &state(0, 2048))),
        ("a packed ring's base", No, message(SET_VRING_BASE, NEED_REPLY, &state(0, 0x8000_0000))),
        ("a ring with a log", No, message(SET_VRING_ADDR, NEED_REPLY, &[state(0, 1), vec![0; 32]].concat())),
        ("a misaligned ring", Goodbye, message(SET_VRING_ADDR, 0, &[state(0, 0), words(&[8, 0, 0, 0])].concat())),
        ("neither enabled nor disabled", Goodbye, message(SET_VRING_ENABLE, NEED_REPLY, &state(0, 2))),
        ("a kick that announces a descriptor and has none", Goodbye, message(SET_VRING_KICK, NEED_REPLY, &words(&[0]))),
        ("a write to configuration space", No, message(SET_CONFIG, NEED_REPLY, &[state(33, 1), vec![0; 5]].concat())),
        (
            "a cache switched to nonsense",
            No,
            message(SET_CONFIG, NEED_REPLY, &[state(32, 1), vec![0, 0, 0, 0, 2]].concat()),
        ),
        ("configuration space past any end", Goodbye, message(GET_CONFIG, 0, &[state(4096, 1), vec![0; 5]].concat())),
        ("a configuration size that lies", Goodbye, message(GET_CONFIG, 0, &[state(0, 60), vec![0; 20]].concat())),
        ("a table without regions", No, message(SET_MEM_TABLE, NEED_REPLY, &state(0, 0))),
        ("a table that lies about its length", No, message(SET_MEM_TABLE, NEED_REPLY, &state(3, 0))),
        ("a table without descriptors", No, message(SET_MEM_TABLE, NEED_REPLY, &[state(1, 0), vec![1; 32]].concat())),
        ("a region without a descriptor", Goodbye, message(ADD_MEM_REG, NEED_REPLY, &[0; 40])),
        ("a region that is not there", No, message(REM_MEM_REG, NEED_REPLY, &words(&[0, 0, 4096, 0, 0]))),
        ("a log that was not offered", Goodbye, message(SET_LOG_BASE, NEED_REPLY, &words(&[4096, 0]))),
        ("inflight that was not offered", Goodbye, message(GET_INFLIGHT_FD, 0, &[0; 24])),
        ("a network's message", Goodbye, message(SEND_RARP, NEED_REPLY, &words(&[0]))),
        ("a status of another size", Goodbye, message(SET_STATUS, NEED_REPLY, &[0; 4])),
        ("a question for the status with a payload", Goodbye, message(GET_STATUS, 0, &words(&[0]))),
    ];
    let rig = Rig::new();
    for (what, expected, bytes) in table {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes, &[]);
        // A conversation that should have ended must not have got an answer first; one that goes on answers the next.
        assert_eq!(told(&wire), expected, "{what}");
    }
    rig.connect().negotiate();
}

/// Those of other kinds of devices, of protocol features that are not offered, and of no meaning yet; IOTLB_MSG among them.
#[test]
fn one_of_what_is_not_offered_ends_the_conversation() {
    const IOTLB_MSG: u32 = 22;
    let rig = Rig::new();
    for request in [7, 19, 20, IOTLB_MSG, 23].into_iter().chain(26..=33).chain([35]).chain(41..=64) {
        for payload in [vec![], words(&[0]), words(&[0; 4])] {
            let wire = rig.connect();
            wire.negotiate();
            wire.send(request, &payload, &[]);
            // A reply may tell of the failure first, as that to CHECK_DEVICE_STATE does.
            let ended = told(&wire) == Goodbye || wire.is_closed();
            assert!(ended, "request {request} of {} bytes", payload.len());
        }
    }
    rig.connect().negotiate();
}

#[test]
fn one_that_is_not_negotiated_ends_the_conversation() {
    let rig = Rig::new();
    for (request, payload) in [
        (GET_STATUS, vec![]),
        (SET_STATUS, words(&[1])),
        (RESET_DEVICE, vec![]),
        (GET_QUEUE_NUM, vec![]),
        (GET_MAX_MEM_SLOTS, vec![]),
        (GET_CONFIG, [state(0, 8), vec![0; 12]].concat()),
        (SET_VRING_ENABLE, state(0, 1)),
    ] {
        let wire = rig.connect();
        wire.sync();
        wire.send(request, &payload, &[]);
        assert_eq!(told(&wire), Goodbye, "request {request}");
    }
}

#[test]
fn descriptors_where_none_belong_or_too_many_end_the_conversation() {
    let rig = Rig::new();
    let extra = event();
    let fds = |count: usize| vec![extra.as_fd(); count];
    let region = [words(&[0]), MemoryRegion { gpa: 0, len: 4096, qva: 0, offset: 0 }.bytes()].concat();
    let cases: Vec<(&str, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        ("with features", message(SET_FEATURES, 0, &words(&[FEATURES])), fds(1)),
        ("with a question", message(GET_FEATURES, 0, &[]), fds(3)),
        ("with a status", message(SET_STATUS, 0, &words(&[1])), fds(1)),
        ("two kicks", message(SET_VRING_KICK, 0, &words(&[0])), fds(2)),
        ("a kick that is none", message(SET_VRING_KICK, 0, &words(&[0x100])), fds(1)),
        ("two for one region", message(ADD_MEM_REG, 0, &region), fds(2)),
        ("one for a table of none", message(SET_MEM_TABLE, 0, &state(0, 0)), fds(1)),
        ("two for a table of one", message(SET_MEM_TABLE, 0, &[state(1, 0), region[8..].to_vec()].concat()), fds(2)),
        ("33 with a kick", message(SET_VRING_KICK, 0, &words(&[0])), fds(33)),
        ("as many as the kernel allows", message(SET_VRING_KICK, 0, &words(&[0])), fds(253)),
    ];
    for (what, bytes, fds) in cases {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes, &fds);
        assert_eq!(told(&wire), Goodbye, "{what}");
    }
    rig.connect().sync();
    assert_eq!(crate::rig::copies_of(&extra), [0_u32; 0], "all have been closed");
}

#[test]
fn descriptors_in_the_middle_of_a_message_end_the_conversation() {
    let rig = Rig::new();
    let ram = memory("ram", 4096);
    let region = [words(&[0]), MemoryRegion { gpa: 0, len: 4096, qva: 0, offset: 0 }.bytes()].concat();
    let bytes = message(ADD_MEM_REG, NEED_REPLY, &region);
    for split in [4, 12, 20] {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes[..split], &[]);
        wire.send_bytes(&bytes[split..], &[ram.as_fd()]);
        let told = wire.reply();
        // Up to its last byte the header may still bring them.
        let expected = if split < 12 { Reply::Message(ADD_MEM_REG, words(&[0])) } else { Reply::Closed };
        assert_eq!(told, expected, "split at {split}");
    }
    let wire = rig.connect();
    wire.negotiate();
    wire.send_bytes(&bytes[..4], &[ram.as_fd()]);
    wire.send_bytes(&bytes[4..], &[]);
    assert_eq!(wire.reply(), Reply::Closed, "a header cut in two by them");
}

#[test]
fn noise_ends_the_conversation() {
    let rig = Rig::new();
    // A fixed sequence of a linear congruential generator: any bytes will do, but the same in each run.
    let mut seed = 0x1234_5678_u32;
    for _ in 0..200 {
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24).to_ne_bytes()[0]
        });
        let mut bytes: Vec<u8> = noise.take(600).collect();
        // A known request and version, so that it gets past the door.
        let request = u32::from(bytes[0] % 44) + 1;
        bytes[..4].copy_from_slice(&request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&1_u32.to_ne_bytes());
        let size = u32::from(bytes[20] % 64);
        bytes[8..12].copy_from_slice(&size.to_ne_bytes());
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes, &[]);
        wire.socket.shutdown(std::net::Shutdown::Write).unwrap();
        while wire.reply() != Reply::Closed {}
    }
    rig.connect().negotiate();
}
