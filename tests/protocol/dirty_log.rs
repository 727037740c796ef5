//! LOG_ALL, SET_LOG_BASE, SET_LOG_FD and the log address of a used ring.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::requests::{BLK_IN, DATA, STATUS, put, wait_for, wait_for_used};
use crate::rig::{Rig, copies_of, event, memory};
use crate::rings::{AVAIL, DESC, RAM, RingEvents, USED, ring_events, send_all, setup_messages};
use crate::wire::{
    FEATURES, LOG_SHMFD, MemoryRegion, NEED_REPLY, PROTOCOL, Reply, Wire, message, request::*, state, words,
};

const LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG.
const F_LOG: u32 = 1;
/// Where the used ring is logged: not guest memory.
const USED_LOG: u64 = 3 << 20;
/// One bit for each page up to 4 MiB.
const BYTES: u64 = (4 << 20) / 4096 / 8;

fn front_end(rig: &Rig) -> (Wire, File, RingEvents) {
    let (wire, ram, events) = (rig.connect(), memory("ram", RAM.len), ring_events());
    wire.negotiate_with(FEATURES, PROTOCOL | LOG_SHMFD);
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    (wire, ram, events)
}

fn running(rig: &Rig) -> (Wire, File, RingEvents) {
    let (wire, ram, events) = front_end(rig);
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    (wire, ram, events)
}

fn send_log(wire: &Wire, file: &File, bytes: u64, offset: u64) {
    wire.send(SET_LOG_BASE, &words(&[bytes, offset]), &[file.as_fd()]);
}

/// SET_LOG_BASE, which is answered.
fn set_log(wire: &Wire, file: &File, bytes: u64, offset: u64) {
    send_log(wire, file, bytes, offset);
    assert!(matches!(wire.reply(), Reply::Message(SET_LOG_BASE, _)));
}

fn set_features(wire: &Wire, more: u64) -> u64 {
    wire.call(SET_FEATURES, &words(&[FEATURES | more]), &[])
}

fn log_used_ring(flags: u32, log: u64) -> Vec<u8> {
    [state(0, flags), words(&[RAM.qva + DESC, RAM.qva + USED, RAM.qva + AVAIL, log])].concat()
}

/// The addresses of the pages that are marked, and no longer are.
fn take(log: &File) -> Vec<u64> {
    let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
    log.read_exact_at(&mut bytes, 0).unwrap();
    log.write_all_at(&vec![0; bytes.len()], 0).unwrap();
    (0..BYTES * 8).filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0).map(|page| page * 4096).collect()
}

fn read_once(ram: &File, events: &RingEvents, number: u16) {
    put(ram, BLK_IN, number);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for_used(ram, number + 1, &events.call);
}

#[test]
fn logging_starts_and_ends_while_the_ring_runs() {
    let rig = Rig::new();
    let ((wire, ram, events), log) = (running(&rig), memory("log", BYTES));
    read_once(&ram, &events, 0);
    set_log(&wire, &log, BYTES, 0);
    read_once(&ram, &events, 1);
    assert!(take(&log).is_empty(), "no feature, no marks");

    assert_eq!(set_features(&wire, LOG_ALL), 0);
    read_once(&ram, &events, 2);
    assert_eq!(take(&log), [RAM.gpa + DATA, RAM.gpa + STATUS], "the used ring is not logged");
    assert_eq!(wire.call(SET_VRING_ADDR, &log_used_ring(F_LOG, USED_LOG), &[]), 0);
    read_once(&ram, &events, 3);
    assert_eq!(wire.stop_ring(0), 4);
    assert_eq!(take(&log), [RAM.gpa + DATA, RAM.gpa + STATUS, USED_LOG]);
}

#[test]
fn logging_that_has_ended_marks_nothing() {
    let rig = Rig::new();
    let ((wire, ram, events), log) = (running(&rig), memory("log", BYTES));
    set_log(&wire, &log, BYTES, 0);
    assert_eq!(wire.call(SET_VRING_ADDR, &log_used_ring(F_LOG, USED_LOG), &[]), 0);
    assert_eq!(set_features(&wire, LOG_ALL), 0);

    assert_eq!(set_features(&wire, 0), 0);
    assert_eq!(wire.call(SET_VRING_ADDR, &log_used_ring(0, 0), &[]), 0);
    // Until then a worker that falls asleep or wakes up marks avail_event.
    take(&log);
    read_once(&ram, &events, 0);
    assert_eq!(wire.stop_ring(0), 1);

    assert!(take(&log).is_empty());
}

/// QEMU sends the log after everything else when it starts a device while it migrates.
#[test]
fn a_ring_waits_for_the_log_that_was_acknowledged() {
    let rig = Rig::new();
    let ((wire, ram, events), log) = (front_end(&rig), memory("log", BYTES));
    assert_eq!(set_features(&wire, LOG_ALL), 0);
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    put(&ram, BLK_IN, 0);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0), &[]), 0, "accepted: the ring does not run");

    set_log(&wire, &log, BYTES, 0);

    wait_for(&events.call);
    assert_eq!(take(&log), [RAM.gpa + DATA, RAM.gpa + STATUS]);
}

#[test]
fn a_log_belongs_to_one_run_of_the_rings() {
    let rig = Rig::new();
    let ((wire, ram, events), log) = (running(&rig), memory("log", BYTES));
    set_log(&wire, &log, BYTES, 0);
    assert_eq!(set_features(&wire, LOG_ALL), 0);
    wire.stop_ring(0);
    assert_eq!(copies_of(&log).len(), 0, "closed");

    assert_eq!(wire.call(SET_VRING_KICK, &words(&[0]), &[events.kick.as_fd()]), 0);
    assert_eq!(wire.call(SET_VRING_BASE, &state(0, 0), &[]), 0, "accepted: the ring waits");
    set_log(&wire, &log, BYTES, 0);
    read_once(&ram, &events, 0);

    assert!(take(&log).contains(&(RAM.gpa + DATA)));
}

#[test]
fn the_log_can_begin_inside_its_file_and_be_replaced() {
    let rig = Rig::new();
    let ((wire, ram, events), first, second) = (running(&rig), memory("log", BYTES), memory("log", 8192));
    set_log(&wire, &first, BYTES, 0);
    assert_eq!(set_features(&wire, LOG_ALL), 0);

    set_log(&wire, &second, BYTES, 4096);
    assert_eq!(copies_of(&first).len(), 0, "closed");
    read_once(&ram, &events, 0);

    assert!(take(&first).is_empty());
    let mut bytes = [0; 4];
    second.read_exact_at(&mut bytes, 4096 + (RAM.gpa + DATA) / 4096 / 8).unwrap();
    assert_eq!(bytes[0], 1 << 5 | 1 << 6);
}

#[test]
fn log_all_without_a_log_is_refused_while_a_ring_runs() {
    let rig = Rig::new();
    let (wire, _ram, _events) = running(&rig);
    assert_eq!(set_features(&wire, LOG_ALL), 1);
    // Without an acknowledgement the front-end would believe that pages are marked.
    wire.send(SET_FEATURES, &words(&[FEATURES | LOG_ALL]), &[]);
    assert!(wire.is_closed());
}

#[test]
fn log_all_without_log_shmfd_is_refused() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    assert_eq!(set_features(&wire, LOG_ALL), 1);
}

#[test]
fn a_log_without_room_for_all_memory_ends_the_connection() {
    let rig = Rig::new();
    for (bytes, offset, size) in [(BYTES / 4, 0, BYTES), (BYTES, 0, BYTES / 2), (BYTES, 8, 8192)] {
        let ((wire, ..), log) = (running(&rig), memory("log", size));
        send_log(&wire, &log, bytes, offset);
        assert!(wire.is_closed(), "{bytes} at {offset} of {size}");
    }
}

#[test]
fn memory_and_used_rings_without_room_in_the_log_are_refused() {
    let rig = Rig::new();
    let ((wire, ram, events), log) = (running(&rig), memory("log", BYTES));
    set_log(&wire, &log, BYTES, 0);
    assert_eq!(set_features(&wire, LOG_ALL), 0);

    let dimm = memory("dimm", 1 << 20);
    let place = MemoryRegion { gpa: 4 << 20, len: 1 << 20, qva: 1 << 45, offset: 0 };
    assert_eq!(wire.add_region(place, dimm.as_fd()), 1);
    assert_eq!(wire.add_region(MemoryRegion { gpa: 3 << 20, ..place }, dimm.as_fd()), 0);
    assert_eq!(wire.call(SET_VRING_ADDR, &log_used_ring(F_LOG, (4 << 20) - 8), &[]), 1);
    assert_eq!(wire.call(SET_VRING_ADDR, &log_used_ring(F_LOG, (4 << 20) - 0x100), &[]), 0);

    read_once(&ram, &events, 0);
    wire.send_bytes(&message(SET_VRING_ADDR, 0, &log_used_ring(F_LOG, u64::MAX)), &[]);
    assert!(wire.is_closed(), "refused without an acknowledgement");
}

#[test]
fn the_front_end_is_told_of_marks() {
    let rig = Rig::new();
    let ((wire, ram, events), log, told) = (running(&rig), memory("log", BYTES), event());
    set_log(&wire, &log, BYTES, 0);
    assert_eq!(wire.call(SET_LOG_FD, &[], &[told.as_fd()]), 0);
    assert_eq!(set_features(&wire, LOG_ALL), 0);

    read_once(&ram, &events, 0);

    wait_for(&told);
    assert_eq!(wire.call(SET_LOG_FD, &[], &[log.as_fd()]), 1, "not an eventfd");
    wire.send_bytes(&message(SET_LOG_FD, NEED_REPLY, &[]), &[]);
    assert!(wire.is_closed(), "no descriptor");
}
