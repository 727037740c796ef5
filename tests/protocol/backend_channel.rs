//! The channel for messages of the back-end.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::rig::{Rig, copies_of, event};
use crate::wire::{BACKEND_REQ, FEATURES, PROTOCOL, Reply, Wire, request::*, state};

/// A front-end with a channel, and both ends of the channel.
fn with_channel(rig: &Rig) -> (Wire, UnixStream, UnixStream) {
    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
    (wire, ours, theirs)
}

fn receive(channel: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    channel.read_exact(&mut bytes).unwrap();
    bytes
}

/// CONFIG_CHANGE_MSG: version 1, no acknowledgement requested, no payload.
fn config_change() -> Vec<u8> {
    [2_u32, 1, 0].map(u32::to_ne_bytes).concat()
}

#[test]
fn a_change_of_the_disk_is_reported_and_the_connection_continues() {
    let rig = Rig::new();
    let (wire, mut channel, _theirs) = with_channel(&rig);

    rig.notifier.config_changed();

    assert_eq!(receive(&mut channel), config_change());
    // The reaction of a front-end. It has sent nothing on the channel.
    wire.send(GET_CONFIG, &[state(0, 60), vec![0; 4 + 60]].concat(), &[]);
    assert!(matches!(wire.reply(), Reply::Message(GET_CONFIG, payload) if payload.len() == 12 + 60));
}

#[test]
fn a_front_end_that_does_not_read_its_channel_is_still_served() {
    let rig = Rig::new();
    let (wire, _channel, _theirs) = with_channel(&rig);
    for _ in 0..2000 {
        rig.notifier.config_changed();
        wire.sync();
    }
}

#[test]
fn the_last_channel_is_used_and_closed_with_the_connection() {
    let rig = Rig::new();
    let (wire, _former, _theirs) = with_channel(&rig);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
    drop(theirs);
    rig.notifier.config_changed();
    assert_eq!(receive(&mut ours), config_change());

    drop(wire);

    assert_eq!(ours.read(&mut [0; 12]).unwrap(), 0, "closed");
    // Without a front-end, a change is ignored.
    rig.notifier.config_changed();
    rig.connect().sync();
}

#[test]
fn a_channel_closed_by_the_front_end_is_not_used_any_more() {
    let rig = Rig::new();
    let (wire, ours, theirs) = with_channel(&rig);
    drop((ours, theirs));
    for _ in 0..3 {
        rig.notifier.config_changed();
        wire.sync();
    }
}

#[test]
fn an_invalid_channel_is_refused_and_closed() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let wrong = event();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[wrong.as_fd()]), 1);
    assert_eq!(copies_of(&wrong).len(), 0);
    wire.sync();
    // Without a descriptor, with two, or without the feature, the message itself is invalid.
    wire.send(SET_BACKEND_REQ_FD, &[], &[]);
    assert!(wire.is_closed());
    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    wire.send(SET_BACKEND_REQ_FD, &[], &[wrong.as_fd(), wrong.as_fd()]);
    assert!(wire.is_closed());
    let wire = rig.connect();
    wire.negotiate();
    wire.send(SET_BACKEND_REQ_FD, &[], &[wrong.as_fd()]);
    assert!(wire.is_closed());
    rig.connect().sync();
    assert_eq!(copies_of(&wrong).len(), 0);
}
