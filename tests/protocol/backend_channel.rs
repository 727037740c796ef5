//! The channel on which the back-end speaks first.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::rig::{Rig, copies_of, event};
use crate::wire::{BACKEND_REQ, FEATURES, PROTOCOL, Reply, Wire, request::*, state};

fn listening(rig: &Rig) -> (Wire, UnixStream, UnixStream) {
    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
    (wire, ours, theirs)
}

fn notice(channel: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    channel.read_exact(&mut bytes).unwrap();
    bytes
}

/// CONFIG_CHANGE_MSG, version 1, no reply wanted, no payload.
fn config_change() -> Vec<u8> {
    [2_u32, 1, 0].map(u32::to_ne_bytes).concat()
}

#[test]
fn a_change_of_the_disk_is_announced_and_the_conversation_goes_on() {
    let rig = Rig::new();
    let (wire, mut channel, _theirs) = listening(&rig);

    rig.notifier.config_changed();

    assert_eq!(notice(&mut channel), config_change());
    // What a front-end does then; nobody has waited for anything on the channel.
    wire.send(GET_CONFIG, &[state(0, 60), vec![0; 4 + 60]].concat(), &[]);
    assert!(matches!(wire.reply(), Reply::Message(GET_CONFIG, payload) if payload.len() == 12 + 60));
}

#[test]
fn a_front_end_that_leaves_its_channel_unread_is_served_all_the_same() {
    let rig = Rig::new();
    let (wire, _channel, _theirs) = listening(&rig);
    for _ in 0..2000 {
        rig.notifier.config_changed();
        wire.sync();
    }
}

#[test]
fn the_last_channel_counts_and_goes_with_the_front_end() {
    let rig = Rig::new();
    let (wire, _former, _theirs) = listening(&rig);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
    drop(theirs);
    rig.notifier.config_changed();
    assert_eq!(notice(&mut ours), config_change());

    drop(wire);

    assert_eq!(ours.read(&mut [0; 12]).unwrap(), 0, "closed");
    // With nobody to tell, a change is no event; the next front-end reads it anyway.
    rig.notifier.config_changed();
    rig.connect().sync();
}

#[test]
fn a_channel_closed_by_the_front_end_is_given_up() {
    let rig = Rig::new();
    let (wire, ours, theirs) = listening(&rig);
    drop((ours, theirs));
    for _ in 0..3 {
        rig.notifier.config_changed();
        wire.sync();
    }
}

#[test]
fn what_is_no_channel_is_refused_and_kept_by_nobody() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate_with(FEATURES, PROTOCOL | BACKEND_REQ);
    let wrong = event();
    assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[wrong.as_fd()]), 1);
    assert_eq!(copies_of(&wrong).len(), 0);
    wire.sync();
    // Without a descriptor, with two, or unasked for, the message itself is wrong.
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
