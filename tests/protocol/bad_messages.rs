//! Invalid messages. Each is refused or ends the connection, and the server serves the next front-end.

use std::os::fd::{AsFd, BorrowedFd};

use crate::rig::{Rig, event, memory};
use crate::wire::{FEATURES, MemoryRegion, NEED_REPLY, PROTOCOL, Reply, Wire, message, request::*, state, words};

/// The server's reaction to an invalid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// A reply that reports failure.
    Refused,
    /// The connection is closed without a reply.
    Closed,
}

use Outcome::{Closed, Refused};

fn outcome(wire: &Wire) -> Outcome {
    match wire.reply() {
        Reply::Closed => Closed,
        Reply::Message(_, payload) if payload == words(&[1]) => Refused,
        other => panic!("{other:?}"),
    }
}

/// Messages that end the connection.
fn closing_messages() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("version 0", [&GET_FEATURES.to_ne_bytes()[..], &[0; 8]].concat()),
        ("version 2", [&GET_FEATURES.to_ne_bytes()[..], &2_u32.to_ne_bytes(), &[0; 4]].concat()),
        ("a reply", message(GET_FEATURES, 4, &[])),
        ("reserved flags", message(GET_FEATURES, 0x10, &[])),
        ("request 0", message(0, 0, &[])),
        ("request 45", message(45, NEED_REPLY, &[])),
        ("an oversized payload", message(SET_CONFIG, 0, &[0; 4097])),
        ("an announced size of 4 GiB", [SET_CONFIG, 1, u32::MAX].map(u32::to_ne_bytes).concat()),
        ("an unexpected payload", message(GET_FEATURES, 0, &[0; 8])),
        ("too short", message(SET_FEATURES, NEED_REPLY, &[0; 4])),
        ("too long", message(SET_VRING_NUM, NEED_REPLY, &[0; 12])),
        ("a misaligned ring", message(SET_VRING_ADDR, 0, &[state(0, 0), words(&[8, 0, 0, 0])].concat())),
        ("neither enabled nor disabled", message(SET_VRING_ENABLE, NEED_REPLY, &state(0, 2))),
        ("a kick without the announced descriptor", message(SET_VRING_KICK, NEED_REPLY, &words(&[0]))),
        (
            "an offset past the end of configuration space",
            message(GET_CONFIG, 0, &[state(4096, 1), vec![0; 5]].concat()),
        ),
        (
            "a configuration size that does not match the payload",
            message(GET_CONFIG, 0, &[state(0, 60), vec![0; 20]].concat()),
        ),
        ("a region without a descriptor", message(ADD_MEM_REG, NEED_REPLY, &[0; 40])),
        ("a log that was not negotiated", message(SET_LOG_BASE, NEED_REPLY, &words(&[4096, 0]))),
        ("an inflight buffer that was not negotiated", message(GET_INFLIGHT_FD, 0, &[0; 24])),
        ("a message for network devices", message(SEND_RARP, NEED_REPLY, &words(&[0]))),
        ("a status of another size", message(SET_STATUS, NEED_REPLY, &[0; 4])),
        ("GET_STATUS with a payload", message(GET_STATUS, 0, &words(&[0]))),
    ]
}

/// Messages that are refused.
fn refused_messages() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("a feature not offered", message(SET_FEATURES, NEED_REPLY, &words(&[FEATURES | 1 << 33]))),
        ("a protocol feature not offered", message(SET_PROTOCOL_FEATURES, NEED_REPLY, &words(&[PROTOCOL | 1 << 4]))),
        ("a ring that does not exist", message(SET_VRING_NUM, NEED_REPLY, &state(99, 8))),
        ("the highest ring index", message(SET_VRING_BASE, NEED_REPLY, &state(u32::MAX, 0))),
        ("a size that is not a power of two", message(SET_VRING_NUM, NEED_REPLY, &state(0, 100))),
        ("size 0", message(SET_VRING_NUM, NEED_REPLY, &state(0, 0))),
        ("too large a ring", message(SET_VRING_NUM, NEED_REPLY, &state(0, 2048))),
        ("a packed ring's base", message(SET_VRING_BASE, NEED_REPLY, &state(0, 0x8000_0000))),
        ("a log of dirty pages without LOG_SHMFD", message(SET_FEATURES, NEED_REPLY, &words(&[FEATURES | 1 << 26]))),
        ("a write to configuration space", message(SET_CONFIG, NEED_REPLY, &[state(33, 1), vec![0; 5]].concat())),
        (
            "an invalid value for writeback",
            message(SET_CONFIG, NEED_REPLY, &[state(32, 1), vec![0, 0, 0, 0, 2]].concat()),
        ),
        ("a table without regions", message(SET_MEM_TABLE, NEED_REPLY, &state(0, 0))),
        ("a table shorter than announced", message(SET_MEM_TABLE, NEED_REPLY, &state(3, 0))),
        ("a table without descriptors", message(SET_MEM_TABLE, NEED_REPLY, &[state(1, 0), vec![1; 32]].concat())),
        ("removal of a region that does not exist", message(REM_MEM_REG, NEED_REPLY, &words(&[0, 0, 4096, 0, 0]))),
    ]
}

#[test]
fn each_is_refused_or_ends_the_connection() {
    let rig = Rig::new();
    for (messages, expected) in [(closing_messages(), Closed), (refused_messages(), Refused)] {
        for (name, bytes) in messages {
            let wire = rig.connect();
            wire.negotiate();
            wire.send_bytes(&bytes, &[]);
            assert_eq!(outcome(&wire), expected, "{name}");
        }
    }
    rig.connect().negotiate();
}

/// Messages for other device types, of features that are not offered, and undefined ones.
#[test]
fn a_message_that_is_not_offered_ends_the_connection() {
    const IOTLB_MSG: u32 = 22;
    let rig = Rig::new();
    for request in [7, 19, 20, IOTLB_MSG, 23].into_iter().chain(26..=33).chain([35]).chain(41..=64) {
        for payload in [vec![], words(&[0]), words(&[0; 4])] {
            let wire = rig.connect();
            wire.negotiate();
            wire.send(request, &payload, &[]);
            // A reply may report the failure first, as the one to CHECK_DEVICE_STATE does.
            let ended = outcome(&wire) == Closed || wire.is_closed();
            assert!(ended, "request {request} of {} bytes", payload.len());
        }
    }
    rig.connect().negotiate();
}

#[test]
fn a_message_that_is_not_negotiated_ends_the_connection() {
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
        assert_eq!(outcome(&wire), Closed, "request {request}");
    }
}

#[test]
fn unexpected_or_too_many_descriptors_end_the_connection() {
    let rig = Rig::new();
    let extra = event();
    let fds = |count: usize| vec![extra.as_fd(); count];
    let region = [words(&[0]), MemoryRegion { gpa: 0, len: 4096, qva: 0, offset: 0 }.bytes()].concat();
    let cases: Vec<(&str, Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        ("with features", message(SET_FEATURES, 0, &words(&[FEATURES])), fds(1)),
        ("with GET_FEATURES", message(GET_FEATURES, 0, &[]), fds(3)),
        ("with a status", message(SET_STATUS, 0, &words(&[1])), fds(1)),
        ("two kicks", message(SET_VRING_KICK, 0, &words(&[0])), fds(2)),
        ("with a kick that announces none", message(SET_VRING_KICK, 0, &words(&[0x100])), fds(1)),
        ("two for one region", message(ADD_MEM_REG, 0, &region), fds(2)),
        ("one for a table of none", message(SET_MEM_TABLE, 0, &state(0, 0)), fds(1)),
        ("two for a table of one", message(SET_MEM_TABLE, 0, &[state(1, 0), region[8..].to_vec()].concat()), fds(2)),
        ("33 with a kick", message(SET_VRING_KICK, 0, &words(&[0])), fds(33)),
        ("as many as the kernel allows", message(SET_VRING_KICK, 0, &words(&[0])), fds(253)),
    ];
    for (name, bytes, fds) in cases {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes, &fds);
        assert_eq!(outcome(&wire), Closed, "{name}");
    }
    rig.connect().sync();
    assert_eq!(crate::rig::copies_of(&extra), [0_u32; 0], "all have been closed");
}

#[test]
fn descriptors_in_the_middle_of_a_message_end_the_connection() {
    let rig = Rig::new();
    let ram = memory("ram", 4096);
    let region = [words(&[0]), MemoryRegion { gpa: 0, len: 4096, qva: 0, offset: 0 }.bytes()].concat();
    let bytes = message(ADD_MEM_REG, NEED_REPLY, &region);
    for split in [4, 12, 20] {
        let wire = rig.connect();
        wire.negotiate();
        wire.send_bytes(&bytes[..split], &[]);
        wire.send_bytes(&bytes[split..], &[ram.as_fd()]);
        let reply = wire.reply();
        // They are accepted together with the last byte of the header.
        let expected = if split < 12 { Reply::Message(ADD_MEM_REG, words(&[0])) } else { Reply::Closed };
        assert_eq!(reply, expected, "split at {split}");
    }
    let wire = rig.connect();
    wire.negotiate();
    wire.send_bytes(&bytes[..4], &[ram.as_fd()]);
    wire.send_bytes(&bytes[4..], &[]);
    assert_eq!(wire.reply(), Reply::Closed, "with the first part of the header");
}

#[test]
fn random_bytes_end_the_connection() {
    let rig = Rig::new();
    // A linear congruential generator, so that each run sends the same bytes.
    let mut seed = 0x1234_5678_u32;
    for _ in 0..200 {
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24).to_ne_bytes()[0]
        });
        let mut bytes: Vec<u8> = noise.take(600).collect();
        // A known request, version and size, so that the header is accepted.
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
