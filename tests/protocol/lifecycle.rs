//! Front-ends connect, disconnect, reconnect, crash, and compete for the device.

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
fn everything_is_released_when_a_front_end_disconnects() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    assert_ne!(copies_of(&ram).len(), 0);
    assert_eq!(rig.guest_memory(), [(RAM.gpa, RAM.len)]);

    drop(wire);
    // The next front-end is served only after the cleanup of the last one.
    rig.connect().sync();

    assert_eq!(rig.guest_memory(), []);
    for (name, fd) in [
        ("memory", ram.as_fd()),
        ("kick", events.kick.as_fd()),
        ("call", events.call.as_fd()),
        ("err", events.err.as_fd()),
    ] {
        assert_eq!(copies_of(fd).len(), 0, "{name}");
    }
}

#[test]
fn everything_is_released_when_the_server_stops() {
    let rig = Rig::new();
    let (wire, ram, events) = running(&rig);
    let path = rig.path.clone();

    rig.stop_then(|| assert!(!path.exists()));

    assert!(wire.is_closed());
    assert_eq!(copies_of(&ram).len() + copies_of(&events.kick).len(), 0);
}

#[test]
fn received_descriptors_are_close_on_exec() {
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
        // fio and libblkio disconnect after the negotiation and connect again.
        let first = rig.connect();
        first.negotiate();
        drop(first);
        let (wire, _ram, _events) = running(&rig);
        assert_eq!(wire.stop_ring(0), 0);
    }
}

#[test]
fn a_front_end_that_disconnects_with_unread_messages_does_not_block_the_next() {
    let rig = Rig::new();
    let burst: Vec<u8> = (0..1000).flat_map(|base| message(SET_VRING_BASE, 0, &state(0, base))).collect();
    for _ in 0..5 {
        let first = rig.connect();
        first.send_bytes(&burst, &[]);
        drop(first);
        rig.connect().sync();
    }
}

#[test]
fn a_second_front_end_is_rejected_and_the_first_continues() {
    let rig = Rig::new();
    let first = rig.connect();
    first.negotiate();
    for _ in 0..3 {
        assert!(rig.connect().is_closed());
    }
    assert_eq!(first.get(GET_PROTOCOL_FEATURES), OFFERED);
}

#[test]
fn half_a_message_does_not_block_the_server() {
    let rig = Rig::new();
    let whole = message(SET_FEATURES, 0, &words(&[0]));
    for half in [1, 11, 12, 13, whole.len() - 1] {
        let slow = rig.connect();
        slow.sync();
        slow.send_bytes(&whole[..half], &[]);
        assert!(rig.connect().is_closed(), "the server still rejects others, after {half} bytes");
        slow.send_bytes(&whole[half..], &[]);
        slow.sync();
    }
    let partial = rig.connect();
    partial.send_bytes(&whole[..5], &[]);
    drop(partial);
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
fn messages_sent_before_a_shutdown_are_served() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.send_bytes(&[message(GET_FEATURES, 0, &[]), message(GET_PROTOCOL_FEATURES, 0, &[])].concat(), &[]);
    wire.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(wire.reply(), Reply::Message(GET_FEATURES, _)));
    assert!(matches!(wire.reply(), Reply::Message(GET_PROTOCOL_FEATURES, _)));
    assert_eq!(wire.reply(), Reply::Closed);
}

#[test]
fn a_front_end_that_does_not_read_its_replies_is_disconnected() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let request = message(GET_CONFIG, 0, &[state(0, 4000), vec![0; 4 + 4000]].concat());
    for _ in 0..1000 {
        wire.send_bytes(&request, &[]);
    }
    let replies = std::iter::repeat_with(|| wire.reply()).take_while(|reply| *reply != Reply::Closed).count();
    assert!(replies < 1000, "{replies}");
    rig.connect().sync();
    rig.stop();
}

#[test]
fn a_connected_socket_is_served_once() {
    let (front_end, back_end) = UnixStream::pair().unwrap();
    let rig = Rig::on_socket(|_| Listen::Fd(back_end.into()));
    let wire = Wire::new(front_end);
    wire.negotiate();
    drop(wire);
    rig.join();
}

#[test]
fn too_many_refusals_end_the_connection() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert!((10..1000).contains(&refusals(&wire, SET_VRING_NUM, &state(0, 3), &[])));

    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let no_socket = event();
    assert!((10..1000).contains(&refusals(&wire, SET_BACKEND_REQ_FD, &[], &[no_socket.as_fd()])));
}

/// The number of times `request` is refused until the connection ends; 1000 if it does not end.
fn refusals(wire: &Wire, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> usize {
    let replies = std::iter::repeat_with(|| {
        wire.send_bytes(&message(request, NEED_REPLY, payload), fds);
        wire.reply()
    });
    replies.take_while(|reply| *reply == Reply::Message(request, words(&[1]))).take(1000).count()
}

#[test]
fn front_ends_that_are_rejected_again_and_again_do_not_fill_the_log() {
    capture_log();
    let rig = Rig::new();
    let first = rig.connect();
    first.negotiate();
    for _ in 0..200 {
        assert!(rig.connect().is_closed());
    }
    // Other tests in this process have rejected front-ends, too.
    assert!((1..100).contains(&logged_lines(&["sent", "away: this device is being used by"])));
}
