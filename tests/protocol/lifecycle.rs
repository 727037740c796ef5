//! Front-ends come, go, come back, crash, and crowd the door.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use vhost_device_vfio::socket::Listen;

use crate::mistakes::{capture_log, logged_lines};
use crate::rig::{Rig, copies_of, event, memory};
use crate::rings::{RAM, running};
use crate::wire::{
    BACKEND_REQ, FEATURES, NEED_REPLY, OFFERED, PROTOCOL, Reply, Wire, message, request::*, state, words,
};

#[test]
fn everything_is_given_back_when_a_front_end_goes() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    assert_ne!(copies_of(&ram).len(), 0);
    assert_eq!(rig.guest_memory(), [(RAM.gpa, RAM.len)]);

    drop(wire);
    // The next one is served only after the last one's affairs are settled.
    rig.connect().sync();

    assert_eq!(rig.guest_memory(), []);
    for (what, fd) in
        [("memory", ram.as_fd()), ("kick", events.kick.as_fd()), ("call", events.call.as_fd()), ("err", events.err.as_fd())]
    {
        assert_eq!(copies_of(fd).len(), 0, "{what}");
    }
}

#[test]
fn everything_is_given_back_when_the_server_stops() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let path = rig.path.clone();

    rig.stop_then(|| assert!(!path.exists()));

    assert!(wire.is_closed());
    assert_eq!(copies_of(&ram).len() + copies_of(&events.kick).len(), 0);
}

#[test]
fn received_descriptors_are_kept_from_children() {
    const CLOEXEC: u32 = 0o2_000_000;
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let extra = memory("extra", 4096);
    let far = crate::wire::MemoryRegion { gpa: 1 << 32, len: 4096, qva: 1 << 32, offset: 0 };
    assert_eq!(wire.set_table(&[(RAM, ram.as_fd()), (far, extra.as_fd())]), 0);

    for fd in [ram.as_fd(), extra.as_fd(), events.kick.as_fd(), events.call.as_fd(), events.err.as_fd()] {
        let flags = copies_of(fd);
        assert!(!flags.is_empty());
        assert!(flags.iter().all(|flags| flags & CLOEXEC != 0), "{flags:?}");
    }
}

#[test]
fn front_ends_follow_each_other() {
    let rig = Rig::new();
    for _ in 0..20 {
        // As fio and libblkio do: connect to ask, close, connect again to work.
        let curious = rig.connect();
        curious.negotiate();
        drop(curious);
        let (wire, _ram, _events) = running(&rig);
        assert_eq!(wire.stop_ring(0), 0);
    }
}

#[test]
fn a_front_end_that_has_left_makes_room_even_with_messages_unread() {
    let rig = Rig::new();
    let burst: Vec<u8> = (0..1000).flat_map(|base| message(SET_VRING_BASE, 0, &state(0, base))).collect();
    for _ in 0..5 {
        let hasty = rig.connect();
        hasty.send_bytes(&burst, &[]);
        drop(hasty);
        rig.connect().sync();
    }
}

#[test]
fn a_second_front_end_is_sent_away_and_the_first_does_not_notice() {
    let rig = Rig::new();
    let first = rig.connect();
    first.negotiate();
    for _ in 0..3 {
        assert!(rig.connect().is_closed());
    }
    assert_eq!(first.get(GET_PROTOCOL_FEATURES), OFFERED);
}

#[test]
fn half_a_message_blocks_nobody() {
    let rig = Rig::new();
    let whole = message(SET_FEATURES, 0, &words(&[0]));
    for half in [1, 11, 12, 13, whole.len() - 1] {
        let slow = rig.connect();
        slow.sync();
        slow.send_bytes(&whole[..half], &[]);
        assert!(rig.connect().is_closed(), "the server still opens its door, after {half} bytes");
        slow.send_bytes(&whole[half..], &[]);
        slow.sync();
    }
    let gone = rig.connect();
    gone.send_bytes(&whole[..5], &[]);
    drop(gone);
    rig.connect().sync();
}

#[test]
fn half_a_message_does_not_keep_the_server_from_stopping() {
    let rig = Rig::new();
    let slow = rig.connect();
    slow.sync();
    slow.send_bytes(&message(SET_FEATURES, 0, &words(&[0]))[..15], &[]);
    rig.stop();
    assert!(slow.is_closed());
}

#[test]
fn many_messages_at_once_are_served_in_order() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let mut burst = Vec::new();
    for base in 0..100 {
        burst.extend(message(SET_VRING_BASE, 0, &state(0, base)));
    }
    wire.send_bytes(&burst, &[]);
    assert_eq!(wire.stop_ring(0), 99);
}

#[test]
fn what_was_sent_before_the_end_is_served() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.send_bytes(&[message(GET_FEATURES, 0, &[]), message(GET_PROTOCOL_FEATURES, 0, &[])].concat(), &[]);
    wire.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(wire.reply(), Reply::Message(GET_FEATURES, _)));
    assert!(matches!(wire.reply(), Reply::Message(GET_PROTOCOL_FEATURES, _)));
    assert_eq!(wire.reply(), Reply::Closed);
}

#[test]
fn a_front_end_that_does_not_read_is_sent_away() {
    let rig = Rig::new();
    let deaf = rig.connect();
    deaf.negotiate();
    let question = message(GET_CONFIG, 0, &[state(0, 4000), vec![0; 4 + 4000]].concat());
    for _ in 0..1000 {
        deaf.send_bytes(&question, &[]);
    }
    let answers = std::iter::repeat_with(|| deaf.reply()).take_while(|reply| *reply != Reply::Closed).count();
    assert!(answers < 1000, "{answers}");
    rig.connect().sync();
    rig.stop();
}

#[test]
fn an_end_of_a_connected_pair_is_served_once() {
    let (front_end, back_end) = UnixStream::pair().unwrap();
    let rig = Rig::on_socket(|_| Listen::Fd(back_end.into()));
    let wire = Wire::new(front_end);
    wire.negotiate();
    drop(wire);
    rig.join();
}

#[test]
fn a_conversation_after_too_many_refusals_is_over() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert!((10..1000).contains(&refusals(&wire, SET_VRING_NUM, &state(0, 3), &[])));

    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let no_socket = event();
    assert!((10..1000).contains(&refusals(&wire, SET_BACKEND_REQ_FD, &[], &[no_socket.as_fd()])));
}

/// How often `request` is refused until the conversation ends; 1000 if it does not.
fn refusals(wire: &Wire, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> usize {
    let replies = std::iter::repeat_with(|| {
        wire.send_bytes(&message(request, NEED_REPLY, payload), fds);
        wire.reply()
    });
    replies.take_while(|reply| *reply == Reply::Message(request, words(&[1]))).take(1000).count()
}

#[test]
fn newcomers_that_come_again_and_again_do_not_fill_the_log() {
    capture_log();
    let rig = Rig::new();
    let first = rig.connect();
    first.negotiate();
    for _ in 0..200 {
        assert!(rig.connect().is_closed());
    }
    // Other tests in this process have newcomers, too.
    assert!((1..100).contains(&logged_lines(&["sent", "away: this device is being used by"])));
}
