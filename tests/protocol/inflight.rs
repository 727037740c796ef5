//! GET_INFLIGHT_FD and SET_INFLIGHT_FD, and regions that another back-end has written: their bytes are made here, from the text
//! of the protocol (vhost-user: "Inflight I/O tracking").

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};

use crate::requests::{BLK_IN, STATUS, put, read, wait_for, wait_for_used};
use crate::rig::{QUEUES, Rig, copies_of, event, memory};
use crate::rings::{RAM, RingEvents, USED, ring_events, send_all, setup_messages};
use crate::wire::{
    FEATURES, INFLIGHT_SHMFD, NEED_REPLY, PROTOCOL, RING_PACKED, Reply, Wire, message, request::*, state, words,
};

/// The payload of both messages: size and offset of the memory, virtqueues and their size.
pub(crate) fn inflight(bytes: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    [&words(&[bytes, offset])[..], &queues.to_ne_bytes(), &size.to_ne_bytes(), &[0; 4]].concat()
}

/// GET_INFLIGHT_FD: the payload of the reply, and its descriptor.
pub(crate) fn get_inflight(wire: &Wire, queues: u16, size: u16) -> (Vec<u8>, OwnedFd) {
    wire.send(GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]);
    let (reply, fd) = wire.reply_with_descriptor();
    let Reply::Message(GET_INFLIGHT_FD, payload) = reply else { panic!("{reply:?}") };
    (payload, fd.expect("a descriptor"))
}

fn set_inflight(wire: &Wire, payload: &[u8], fd: BorrowedFd<'_>) -> u64 {
    wire.call(SET_INFLIGHT_FD, payload, &[fd])
}

fn connect(rig: &Rig, features: u64) -> Wire {
    let wire = rig.connect();
    wire.negotiate_with(features, PROTOCOL | INFLIGHT_SHMFD);
    wire
}

/// Bytes for regions of two virtqueues of eight descriptors, each aligned to 64.
const SPLIT: u64 = 2 * 192;
const PACKED: u64 = 2 * 320;

/// `QueueRegionSplit` with eight entries: features, version, desc_num, last_batch_head, used_idx.
fn region(version: u16, last_batch_head: u16, used_idx: u16) -> Vec<u8> {
    let fields = [version, 8, last_batch_head, used_idx].map(u16::to_le_bytes).concat();
    [vec![0; 8], fields, vec![0; 8 * 16]].concat()
}

/// Marks the request at descriptor 0 as in flight.
fn with_mark(mut region: Vec<u8>) -> Vec<u8> {
    (region[16], region[24]) = (1, 77);
    region
}

/// A front-end with memory, one request in ring 0, and this region. The ring has not been started.
fn front_end(rig: &Rig, region: &[u8]) -> (Wire, File, RingEvents, File) {
    let (wire, ram, events) = (connect(rig, FEATURES), memory("ram", RAM.len), ring_events());
    let file = memory("inflight", SPLIT);
    file.write_all_at(region, 0).unwrap();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    assert_eq!(set_inflight(&wire, &inflight(SPLIT, 0, 2, 8), file.as_fd()), 0);
    put(&ram, BLK_IN, 0);
    (wire, ram, events, file)
}

fn start(wire: &Wire, events: &RingEvents) {
    send_all(wire, &setup_messages(events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
}

fn version(file: &File) -> u16 {
    u16::from_le_bytes(read::<2>(file, 8))
}

#[test]
fn the_regions_are_a_sealed_file_of_zeroes_for_the_layout() {
    let rig = Rig::new();
    for (features, size, expected) in [(FEATURES, 8, SPLIT), (FEATURES | RING_PACKED, 8, PACKED)] {
        let wire = connect(&rig, features);
        let (payload, fd) = get_inflight(&wire, 2, size);
        let file = File::from(fd);

        assert_eq!(payload, inflight(expected, 0, 2, size));
        assert_eq!(file.metadata().unwrap().len(), expected);
        let mut bytes = vec![1; usize::try_from(expected).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        assert_eq!(fcntl_get_seals(&file).unwrap(), seals);
        assert_eq!(set_inflight(&wire, &payload, file.as_fd()), 0);
    }
}

#[test]
fn before_set_features_there_is_room_for_either_layout() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.send(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL | INFLIGHT_SHMFD]), &[]);
    let (payload, fd) = get_inflight(&wire, 2, 8);
    assert_eq!(payload, inflight(PACKED, 0, 2, 8));
    wire.send(SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
    wire.sync();
}

#[test]
fn a_question_for_impossible_rings_ends_the_connection() {
    let rig = Rig::new();
    for (queues, size) in [(0, 8), (QUEUES + 1, 8), (u16::MAX, 8), (1, 0), (1, 7), (1, 2048), (1, u16::MAX)] {
        let wire = connect(&rig, FEATURES);
        wire.send(GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]);
        assert!(wire.is_closed(), "{queues} of {size}");
    }
    let packed = connect(&rig, FEATURES | RING_PACKED);
    get_inflight(&packed, 1, 7);
    drop(packed);
    let without = rig.connect();
    without.negotiate();
    without.send(GET_INFLIGHT_FD, &inflight(0, 0, 1, 8), &[]);
    assert!(without.is_closed(), "not negotiated");
}

#[test]
fn regions_that_cannot_be_used_are_refused() {
    let rig = Rig::new();
    let wire = connect(&rig, FEATURES);
    let file = memory("inflight", 0x3000);
    let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    let (eventfd, procfs) = (event(), File::open("/proc/self/maps").unwrap());
    let good = inflight(SPLIT, 0, 2, 8);
    let cases: [(&str, Vec<u8>, BorrowedFd<'_>); 13] = [
        ("more virtqueues than there are", inflight(0x1000, 0, QUEUES + 1, 8), file.as_fd()),
        ("no power of two", inflight(0x1000, 0, 1, 7), file.as_fd()),
        ("too long a ring", inflight(0x3000, 0, 1, 2048), file.as_fd()),
        ("one byte too few", inflight(2 * 144 - 1, 0, 2, 8), file.as_fd()),
        ("no bytes", inflight(0, 0, 2, 8), file.as_fd()),
        ("an offset inside a page", inflight(SPLIT, 64, 2, 8), file.as_fd()),
        ("an offset at the end", inflight(SPLIT, 0x3000, 2, 8), file.as_fd()),
        ("an offset past the end of the address space", inflight(SPLIT, 0xffff_ffff_ffff_f000, 2, 8), file.as_fd()),
        ("more bytes than the file has", inflight(0x3001, 0, 4, 1024), file.as_fd()),
        ("all bytes of the address space", inflight(u64::MAX, 0, 4, 1024), file.as_fd()),
        ("a file that cannot be written", good.clone(), read_only.as_fd()),
        ("an eventfd", good.clone(), eventfd.as_fd()),
        ("a file that is not in memory", good.clone(), procfs.as_fd()),
    ];
    for (name, payload, fd) in cases {
        assert_eq!(set_inflight(&wire, &payload, fd), 1, "{name}");
    }
    drop(read_only);
    assert_eq!(copies_of(&file), Vec::<u32>::new(), "refused files are closed");
    assert_eq!(set_inflight(&wire, &good, file.as_fd()), 0);
    assert_eq!(set_inflight(&wire, &inflight(SPLIT, 0x2000, 2, 8), file.as_fd()), 0);
}

#[test]
fn a_refusal_that_the_front_end_would_not_hear_ends_the_connection() {
    let rig = Rig::new();
    let file = memory("inflight", SPLIT);
    let wire = connect(&rig, FEATURES);
    wire.send(SET_INFLIGHT_FD, &inflight(1, 0, 2, 8), &[file.as_fd()]);
    assert!(wire.is_closed());
    let wire = connect(&rig, FEATURES);
    wire.send_bytes(&message(SET_INFLIGHT_FD, NEED_REPLY, &inflight(SPLIT, 0, 2, 8)), &[]);
    assert!(wire.is_closed(), "no descriptor");
}

#[test]
fn the_file_is_not_inherited_and_is_closed_with_the_connection() {
    const CLOEXEC: u32 = 0o2_000_000;
    let rig = Rig::new();
    let (wire, _ram, events, file) = front_end(&rig, &region(0, 0, 0));
    start(&wire, &events);

    let copies = copies_of(&file);

    assert!(!copies.is_empty() && copies.iter().all(|flags| flags & CLOEXEC != 0), "{copies:?}");
    drop(wire);
    rig.connect().sync();
    assert_eq!(copies_of(&file), Vec::<u32>::new());
}

#[test]
fn a_new_region_is_initialized_and_is_without_marks_after_a_stop() {
    let rig = Rig::new();
    let (wire, ram, events, file) = front_end(&rig, &[]);
    start(&wire, &events);
    wait_for(&events.call);

    assert_eq!(wire.stop_ring(0), 1);

    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert_eq!(read::<16>(&file, 0), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 0, 1, 0]);
    assert_eq!(read::<1>(&file, 16), [0], "no mark");
    assert_eq!(read::<128>(&file, 192), [0; 128], "virtqueue 1 has not run");
}

#[test]
fn a_request_that_another_back_end_has_left_is_done_once() {
    let rig = Rig::new();
    let (wire, ram, events, file) = front_end(&rig, &with_mark(region(1, 0, 0)));

    start(&wire, &events);
    wait_for_used(&ram, 1, &events.call);

    assert_eq!((read::<1>(&ram, STATUS), read::<2>(&ram, USED + 2)), ([0], [1, 0]));
    put(&ram, BLK_IN, 1);
    rustix::io::write(&events.kick, &1_u64.to_ne_bytes()).unwrap();
    wait_for_used(&ram, 2, &events.call);
    assert_eq!(wire.stop_ring(0), 2);
    assert_eq!((read::<1>(&file, 16), read::<2>(&file, 14)), ([0], [2, 0]));
}

#[test]
fn a_request_that_another_back_end_has_published_is_not_done_again() {
    let rig = Rig::new();
    let (wire, ram, events, file) = front_end(&rig, &with_mark(region(1, 0, 0)));
    ram.write_all_at(&1_u16.to_le_bytes(), USED + 2).unwrap();
    let mut messages = setup_messages(&events);
    messages[1].1 = state(0, 1); // SET_VRING_BASE, the used index

    send_all(&wire, &messages);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);

    assert_eq!(wire.stop_ring(0), 1);
    assert_eq!(read::<1>(&ram, STATUS), [0xff], "not done again");
    assert_eq!((read::<1>(&file, 16), read::<2>(&file, 14)), ([0], [1, 0]), "the mark is cleared");
}

#[test]
fn a_region_that_contradicts_the_ring_fails_only_this_ring() {
    let rig = Rig::new();
    let mut unknown = with_mark(region(1, 0, 0));
    unknown[16] = 2;
    for bytes in [with_mark(region(2, 0, 0)), with_mark(region(1, 0, 5)), unknown] {
        let (wire, ram, events, file) = front_end(&rig, &bytes);

        start(&wire, &events);
        wait_for(&events.err);

        assert_eq!(wire.stop_ring(0), 0);
        assert_eq!(read::<1>(&ram, STATUS), [0xff], "not done");
        assert_eq!(read::<144>(&file, 0).to_vec(), bytes, "left as it is");
    }
}

#[test]
fn a_region_for_other_rings_is_not_used() {
    let rig = Rig::new();
    // Of the other layout.
    let (wire, _ram, events, _) = front_end(&rig, &[]);
    let file = memory("inflight", PACKED);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES | RING_PACKED]), &[]), 0);
    assert_eq!(set_inflight(&wire, &inflight(PACKED, 0, 2, 8), file.as_fd()), 0);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);
    start(&wire, &events);
    wait_for(&events.call);
    assert_eq!(version(&file), 0);
    drop(wire);
    // Of shorter rings.
    let (wire, _ram, events, file) = front_end(&rig, &[]);
    assert_eq!(set_inflight(&wire, &inflight(SPLIT, 0, 2, 4), file.as_fd()), 0);
    start(&wire, &events);
    wait_for(&events.call);
    assert_eq!(version(&file), 0);
}

#[test]
fn a_reset_forgets_the_region() {
    let rig = Rig::new();
    for request in [RESET_DEVICE, SET_STATUS] {
        let (wire, _ram, events, file) = front_end(&rig, &[]);
        let payload = if request == SET_STATUS { words(&[0]) } else { vec![] };
        assert_eq!(wire.call(request, &payload, &[]), 0);
        assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);
        start(&wire, &events);
        wait_for(&events.call);
        assert_eq!(version(&file), 0);
    }
}

#[test]
fn regions_without_gaps_are_recognized_by_their_size() {
    let rig = Rig::new();
    let (wire, ram, file) = (connect(&rig, FEATURES), memory("ram", RAM.len), memory("inflight", 2 * 144));
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    assert_eq!(set_inflight(&wire, &inflight(2 * 144, 0, 2, 8), file.as_fd()), 0);
    let events = ring_events();
    let mut messages = setup_messages(&events);
    for (request, payload, _) in &mut messages {
        // Ring 1, at the same addresses.
        payload[0] = 1;
        assert_ne!(*request, SET_VRING_ENABLE);
    }

    send_all(&wire, &messages);
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(1, 1), &[]), 0);

    assert_eq!(wire.stop_ring(1), 0);
    assert_eq!(read::<2>(&file, 144 + 8), [1, 0], "version");
    assert_eq!(version(&file), 0);
}

#[test]
fn a_front_end_that_truncates_the_file_harms_nobody_else() {
    let rig = Rig::new();
    let (wire, ram, events, file) = front_end(&rig, &[]);
    ftruncate(&file, 0).unwrap();
    start(&wire, &events);
    wait_for(&events.call);
    assert_eq!(read::<1>(&ram, STATUS), [0]);
    assert_eq!(wire.stop_ring(0), 1);
}
