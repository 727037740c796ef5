//! The messages of stock front-ends: QEMU 10.0 and 11.1, and libblkio.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::inflight::get_inflight;
use crate::requests::{BLK_IN, STATUS, put, read, wait_for, wait_for_used};
use crate::rig::{QUEUES, Rig, copies_of, event, memory};
use crate::rings::{AVAIL, DESC, RAM, RingEvents, USED, addresses, ring_events};
use crate::wire::{
    BACKEND_REQ, FEATURES, GPA_ADDRESSES, INFLIGHT_SHMFD, MemoryRegion, NEED_REPLY, PROTOCOL, RING_PACKED, Reply, Wire,
    message, request::*, state, words,
};

/// The differences between versions of QEMU.
#[derive(Clone, Copy, Debug)]
struct Version {
    protocol: u64,
    /// Requests an acknowledgement of ring descriptors.
    acks_for_events: bool,
}

const QEMU_10_0: Version = Version { protocol: PROTOCOL | BACKEND_REQ | INFLIGHT_SHMFD, acks_for_events: false };
const QEMU_11_1: Version =
    Version { protocol: PROTOCOL | BACKEND_REQ | INFLIGHT_SHMFD | GPA_ADDRESSES, acks_for_events: true };

/// RAM above 4 GiB, in the same file.
const HIGH: MemoryRegion = MemoryRegion { gpa: 4 << 30, len: 1 << 20, qva: RAM.qva + RAM.len, offset: RAM.len };
const DIMM: MemoryRegion = MemoryRegion { gpa: 8 << 30, len: 1 << 20, qva: 1 << 45, offset: 0 };

struct Qemu {
    version: Version,
    wire: Wire,
    events: RingEvents,
    ram: File,
    /// Payload and descriptor of SET_INFLIGHT_FD. Kept over stops and connections, and dropped at a reset.
    inflight: RefCell<Option<(Vec<u8>, OwnedFd)>>,
    _channel: (UnixStream, UnixStream),
}

impl Qemu {
    /// The first messages of each connection.
    fn connect(rig: &Rig, version: Version) -> Self {
        let wire = rig.connect();
        assert_eq!(wire.get(GET_FEATURES) & FEATURES, FEATURES);
        let offered = wire.get(GET_PROTOCOL_FEATURES);
        wire.send(SET_PROTOCOL_FEATURES, &words(&[offered & version.protocol]), &[]);
        assert_eq!(wire.get(GET_QUEUE_NUM), u64::from(QUEUES));
        assert_eq!(wire.get(GET_MAX_MEM_SLOTS), 509);
        let channel = UnixStream::pair().unwrap();
        assert_eq!(wire.call(SET_BACKEND_REQ_FD, &[], &[channel.1.as_fd()]), 0);
        wire.send(SET_OWNER, &[], &[]);
        wire.get(GET_FEATURES);
        let (events, ram, inflight) = (ring_events(), memory("ram", 2 * RAM.len), RefCell::default());
        let qemu = Self { version, wire, events, ram, inflight, _channel: channel };
        for index in 0..u64::from(QUEUES) {
            qemu.event(SET_VRING_CALL, index, qemu.events.call.as_fd());
            qemu.event(SET_VRING_ERR, index, qemu.events.err.as_fd());
        }
        qemu
    }

    /// The first connection: reads the configuration space and resets the device.
    fn realize(rig: &Rig, version: Version) -> Self {
        let qemu = Self::connect(rig, version);
        for size in [57, 60] {
            qemu.wire.send(GET_CONFIG, &[state(0, size), vec![0; 4 + size as usize]].concat(), &[]);
            assert!(matches!(qemu.wire.reply(), Reply::Message(GET_CONFIG, _)));
        }
        qemu.reset();
        qemu
    }

    fn reset(&self) {
        self.wire.send(RESET_DEVICE, &[], &[]);
        self.wire.send(RESET_DEVICE, &[], &[]);
        self.inflight.take();
    }

    fn event(&self, request: u32, index: u64, fd: BorrowedFd<'_>) {
        if self.version.acks_for_events {
            assert_eq!(self.wire.call(request, &words(&[index]), &[fd]), 0);
        } else {
            self.wire.send(request, &words(&[index]), &[fd]);
        }
    }

    fn address(&self, region: MemoryRegion) -> u64 {
        if self.version.protocol & GPA_ADDRESSES != 0 { region.gpa } else { region.qva }
    }

    fn add(&self, region: MemoryRegion, fd: BorrowedFd<'_>) {
        assert_eq!(self.wire.add_region(MemoryRegion { qva: self.address(region), ..region }, fd), 0);
    }

    fn driver_ok(&self) {
        self.wire.send(SET_FEATURES, &words(&[FEATURES]), &[]);
        self.wire.send(SET_STATUS, &words(&[0xb]), &[]);
        let mut inflight = self.inflight.borrow_mut();
        let (payload, fd) = inflight.get_or_insert_with(|| get_inflight(&self.wire, QUEUES, 8));
        self.wire.send(SET_INFLIGHT_FD, payload, &[fd.as_fd()]);
        self.wire.send(SET_FEATURES, &words(&[FEATURES]), &[]);
    }

    /// The guest uses rings 0 and 1. QEMU enables all.
    fn start_rings(&self, base: u32) {
        for index in 0..2 {
            let start = self.address(RAM) + 0x8000 * u64::from(index);
            self.wire.send(SET_VRING_NUM, &state(index, 8), &[]);
            self.wire.send(SET_VRING_BASE, &state(index, if index == 0 { base } else { 0 }), &[]);
            self.wire.send(SET_VRING_ADDR, &addresses(index, start + DESC, start + AVAIL, start + USED), &[]);
            self.event(
                SET_VRING_KICK,
                index.into(),
                if index == 0 { self.events.kick.as_fd() } else { self.events.err.as_fd() },
            );
            self.event(SET_VRING_CALL, index.into(), self.events.call.as_fd());
        }
        for index in 0..u32::from(QUEUES) {
            assert_eq!(self.wire.call(SET_VRING_ENABLE, &state(index, 1), &[]), 0, "unused rings, too");
        }
        self.wire.send(SET_STATUS, &words(&[0xf]), &[]);
        assert_eq!(self.wire.get(GET_STATUS), 0xf);
    }

    fn stop_rings(&self) -> u32 {
        for index in 0..u32::from(QUEUES) {
            assert_eq!(self.wire.call(SET_VRING_ENABLE, &state(index, 0), &[]), 0);
        }
        assert_eq!(self.wire.stop_ring(1), 0);
        self.wire.stop_ring(0)
    }

    fn read(&self, number: u16) {
        put(&self.ram, BLK_IN, number);
        rustix::io::write(&self.events.kick, &1_u64.to_ne_bytes()).unwrap();
        // A ring that has run begins with a call.
        while read::<1>(&self.ram, STATUS) == [0xff] {
            wait_for(&self.events.call);
        }
        assert_eq!(read::<1>(&self.ram, STATUS), [0], "request {number} of {:?}", self.version);
    }

    fn boot(&self) {
        self.driver_ok();
        // Two regions in one file.
        self.add(RAM, self.ram.as_fd());
        self.add(HIGH, self.ram.as_fd());
        self.start_rings(0);
        self.read(0);
    }
}

#[test]
fn qemu_boots_stops_continues_and_resets() {
    let rig = Rig::new();
    for version in [QEMU_10_0, QEMU_11_1] {
        let qemu = Qemu::realize(&rig, version);
        qemu.boot();
        let mapped = [(RAM.gpa, RAM.len), (HIGH.gpa, HIGH.len)];

        // `stop` and `cont` send no messages about memory.
        let base = qemu.stop_rings();
        assert_eq!(base, 1);
        qemu.driver_ok();
        qemu.start_rings(base);
        qemu.read(1);
        assert_eq!(rig.guest_memory(), mapped);

        // Neither does `system_reset`.
        assert_eq!(qemu.stop_rings(), 2);
        qemu.reset();
        qemu.ram.sync_all().unwrap();
        assert_eq!(rig.guest_memory(), mapped);
        for offset in [AVAIL, USED] {
            std::os::unix::fs::FileExt::write_all_at(&qemu.ram, &[0; 64], offset).unwrap();
        }
        qemu.driver_ok();
        qemu.start_rings(0);
        qemu.read(0);
    }
}

#[test]
fn a_dimm_is_plugged_and_unplugged_while_the_guest_runs() {
    let rig = Rig::new();
    for version in [QEMU_10_0, QEMU_11_1] {
        let (qemu, dimm) = (Qemu::realize(&rig, version), memory("dimm", DIMM.len));
        qemu.boot();

        qemu.add(DIMM, dimm.as_fd());
        assert_eq!(rig.guest_memory().len(), 3);
        qemu.read(1);
        assert_eq!(qemu.wire.remove_region(MemoryRegion { qva: qemu.address(DIMM), ..DIMM }), 0);
        qemu.read(2);

        assert_eq!(rig.guest_memory().len(), 2);
        assert_eq!(copies_of(&dimm).len(), 0);
    }
}

#[test]
fn a_reconnecting_front_end_continues() {
    let rig = Rig::new();
    let first = Qemu::realize(&rig, QEMU_11_1);
    first.boot();
    let Qemu { ram, wire, inflight, .. } = first;
    drop(wire);

    // The same guest memory and the ring's base. The configuration space is not read again.
    let again = Qemu { ram, inflight, ..Qemu::connect(&rig, QEMU_11_1) };
    again.driver_ok();
    again.add(RAM, again.ram.as_fd());
    again.add(HIGH, again.ram.as_fd());
    again.start_rings(1);

    again.read(1);
}

#[test]
fn what_was_in_flight_at_a_disconnect_is_done_after_the_reconnection() {
    let rig = Rig::new();
    let first = Qemu::realize(&rig, QEMU_11_1);
    first.boot();
    let Qemu { ram, wire, inflight, .. } = first;
    drop(wire);
    // Once another is served, the rings of the first have stopped.
    rig.connect().sync();
    // A back-end that ended in between has taken the second request: entry 0 is marked.
    put(&ram, BLK_IN, 1);
    let region = File::from(inflight.borrow().as_ref().unwrap().1.try_clone().unwrap());
    for (at, byte) in [(24, 1), (16, 1)] {
        std::os::unix::fs::FileExt::write_all_at(&region, &[byte], at).unwrap();
    }

    let again = Qemu { ram, inflight, ..Qemu::connect(&rig, QEMU_11_1) };
    again.driver_ok();
    again.add(RAM, again.ram.as_fd());
    again.add(HIGH, again.ram.as_fd());
    // The base is the used index. The guest does not kick again.
    again.start_rings(1);

    wait_for_used(&again.ram, 2, &again.events.call);
    assert_eq!((read::<1>(&again.ram, STATUS), read::<2>(&again.ram, USED + 2)), ([0], [2, 0]));
    again.read(2);
    assert_eq!(again.stop_rings(), 3);
}

#[test]
fn a_ring_in_a_hole_of_shared_memory_is_refused_and_the_others_continue() {
    let rig = Rig::new();
    let qemu = Qemu::realize(&rig, QEMU_10_0);
    qemu.boot();
    // A NUMA node that is not shared, so there is no message about it.
    let hole = RAM.qva + (1 << 40);
    assert_eq!(qemu.wire.call(SET_VRING_NUM, &state(2, 8), &[]), 0);
    assert_eq!(qemu.wire.call(SET_VRING_ADDR, &addresses(2, hole, hole + 0x1000, hole + 0x2000), &[]), 0);
    assert_eq!(qemu.wire.call(SET_VRING_KICK, &words(&[2 | 0x100]), &[]), 1);
    qemu.read(1);
}

#[test]
fn libblkio_requests_acknowledgements_of_messages_that_have_a_reply() {
    let rig = Rig::new();
    let wire = rig.connect();
    for (request, expected) in [(GET_FEATURES, FEATURES), (GET_PROTOCOL_FEATURES, 0x8209)] {
        assert_eq!(wire.call(request, &[], &[]) & expected, expected);
    }
    wire.send(SET_PROTOCOL_FEATURES, &words(&[0x8209]), &[]);
    wire.send(SET_FEATURES, &words(&[FEATURES]), &[]);
    assert_eq!(wire.call(GET_QUEUE_NUM, &[], &[]), u64::from(QUEUES));
    assert_eq!(wire.call(GET_MAX_MEM_SLOTS, &[], &[]), 509);
    wire.send_bytes(&message(GET_CONFIG, NEED_REPLY, &[state(0, 60), vec![0; 64]].concat()), &[]);
    assert!(matches!(wire.reply(), Reply::Message(GET_CONFIG, _)));
    wire.send_bytes(&message(GET_VRING_BASE, NEED_REPLY, &state(0, 0)), &[]);
    assert!(matches!(wire.reply(), Reply::Message(GET_VRING_BASE, _)));
    // A superfluous reply would be taken for this one.
    assert_eq!(wire.get(GET_FEATURES) & RING_PACKED, RING_PACKED);
    // It disconnects and connects again before its requests.
    drop(wire);
    rig.connect().sync();
}

#[test]
fn memory_may_be_sealed_as_qemu_seals_it() {
    let rig = Rig::new();
    let wire = rig.connect();
    wire.negotiate();
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW;
    for (n, seals) in (0..).zip([all, SealFlags::SEAL]) {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, RAM.len).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        let region = MemoryRegion { gpa: RAM.gpa + n * RAM.len, qva: RAM.qva + n * RAM.len, ..RAM };
        assert_eq!(wire.add_region(region, fd.as_fd()), 0, "{seals:?}");
    }
}

#[test]
fn a_descriptor_that_comes_with_a_removal_is_closed() {
    let rig = Rig::new();
    let (wire, ram, stray) = (rig.connect(), memory("ram", RAM.len), event());
    wire.negotiate();
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    let payload = [words(&[0]), RAM.bytes()].concat();
    assert_eq!(wire.call(REM_MEM_REG, &payload, &[stray.as_fd()]), 0);
    wire.sync();
    assert_eq!(copies_of(&stray).len() + copies_of(&ram).len(), 0);
}
