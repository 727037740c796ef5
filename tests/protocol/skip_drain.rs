//! GET_VRING_BASE_SKIP_DRAIN, and GET_VRING_BASE where requests may be left in the inflight region. The drive needs longer than
//! the server waits.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vhost_device_vfio::emulated::{Mode, Options};
use vhost_device_vfio::vhost_user::Succession;

use crate::inflight::inflight;
use crate::packed;
use crate::requests::{BLK_IN, BLK_OUT, DATA, STATUS, put, read, wait_for, wait_for_used};
use crate::rig::{Environment, Rig, memory};
use crate::rings::{RAM, RingEvents, USED, ring_events, running, send_all, setup_messages};
use crate::wire::{
    BASE_INFLIGHT, FEATURES, INFLIGHT_SHMFD, PROTOCOL, RING_PACKED, SKIP_DRAIN, Wire, request::*, state, words,
};

const LATENCY: Duration = Duration::from_millis(1500);
const ALL: u64 = PROTOCOL | INFLIGHT_SHMFD | BASE_INFLIGHT | SKIP_DRAIN;

/// Regions of four virtqueues of eight descriptors: their bytes, and where ring 0's first mark is.
const SPLIT: (u64, u64) = (4 * 192, 16);
const PACKED: (u64, u64) = (4 * 320, 32);

/// A server whose drive executes a command only after [`LATENCY`].
fn slow() -> Rig {
    Rig::with_drive(slow_drive())
}

fn slow_drive() -> Options {
    Options { size: 16 << 20, queues: 2, latency: LATENCY, mode: Mode::Threaded, ..Options::default() }
}

/// What a guest has, and what its front-end keeps.
struct Guest {
    ram: File,
    events: RingEvents,
    regions: File,
    layout: u64,
}

impl Guest {
    fn new(layout: u64) -> Self {
        let bytes = if layout == RING_PACKED { PACKED.0 } else { SPLIT.0 };
        let regions = memory("inflight", bytes);
        Self { ram: memory("ram", RAM.len), events: ring_events(), regions, layout }
    }

    /// A front-end that starts ring 0 at `base`.
    fn start(&self, rig: &Rig, base: u32) -> Wire {
        let wire = rig.connect();
        wire.negotiate_with(FEATURES | self.layout, ALL);
        assert_eq!(wire.add_region(RAM, self.ram.as_fd()), 0);
        self.set_regions(&wire);
        self.start_ring(&wire, base);
        wire
    }

    fn set_regions(&self, wire: &Wire) {
        let bytes = self.regions.metadata().unwrap().len();
        let size = if self.layout == RING_PACKED { u16::try_from(packed::SIZE).unwrap() + 1 } else { 8 };
        assert_eq!(wire.call(SET_INFLIGHT_FD, &inflight(bytes, 0, 4, size), &[self.regions.as_fd()]), 0);
    }

    fn start_ring(&self, wire: &Wire, base: u32) {
        let mut messages = setup_messages(&self.events);
        if self.layout == RING_PACKED {
            messages[0].1 = state(0, packed::SIZE);
        }
        messages[1].1 = state(0, base);
        send_all(wire, &messages);
        assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    }

    /// Puts a request into ring 0, and waits until the server has taken it.
    fn request(&self, kind: u32, number: u16) {
        if self.layout == RING_PACKED {
            packed::put(&self.ram, kind, number.into());
        } else {
            put(&self.ram, kind, number);
        }
        rustix::io::write(&self.events.kick, &1_u64.to_ne_bytes()).unwrap();
        while !self.is_marked() {
            std::thread::yield_now();
        }
    }

    fn is_marked(&self) -> bool {
        let at = if self.layout == RING_PACKED { PACKED.1 } else { SPLIT.1 };
        read::<1>(&self.regions, at) != [0]
    }

    /// Waits until the `number`th request is used.
    fn wait(&self, number: u16) {
        if self.layout == RING_PACKED {
            while !packed::is_used(&self.ram, number.into()) {
                wait_for(&self.events.call);
            }
        } else {
            wait_for_used(&self.ram, number + 1, &self.events.call);
        }
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(RAM.len).unwrap()];
        self.ram.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// The base of ring 0 after one request was taken and none used, and that before any request.
fn bases(layout: u64) -> (u32, u32) {
    if layout == RING_PACKED { (0x8000_8003, 0x8000_8000) } else { (1, 0) }
}

#[test]
fn a_write_in_flight_is_left_touches_nothing_and_is_done_once_by_the_next_session() {
    for layout in [0, RING_PACKED] {
        let (rig, guest) = (slow(), Guest::new(layout));
        let (after, first) = bases(layout);
        let wire = guest.start(&rig, first);
        guest.ram.write_all_at(&[0x5a; 512], DATA).unwrap();
        guest.request(BLK_OUT, 0);

        assert_eq!(wire.suspend_ring(0), after);

        let left = guest.contents();
        assert_eq!(read::<1>(&guest.ram, STATUS), [0xff], "not completed");
        assert!(guest.is_marked());
        std::thread::sleep(LATENCY + LATENCY / 2);
        assert!(guest.contents() == left, "nothing writes to memory any more");
        assert_eq!(wire.suspend_ring(0), after, "a second stop returns the base again");
        drop(wire);

        // QEMU has no better base than the used index, or the first one.
        let wire = guest.start(&rig, first);
        guest.wait(0);
        assert_eq!(read::<1>(&guest.ram, STATUS), [0]);
        assert!(!guest.is_marked());
        guest.ram.write_all_at(&[0; 512], DATA).unwrap();
        guest.request(BLK_IN, 1);
        guest.wait(1);
        assert_eq!(read::<512>(&guest.ram, DATA), [0x5a; 512]);
        let end = if layout == RING_PACKED { 0x8006_8006 } else { 2 };
        assert_eq!(wire.stop_ring(0), end, "two requests");
    }
}

#[test]
fn the_same_front_end_goes_on_after_it_has_suspended_a_ring() {
    for layout in [0, RING_PACKED] {
        let (rig, guest) = (slow(), Guest::new(layout));
        let wire = guest.start(&rig, bases(layout).1);
        guest.request(BLK_IN, 0);

        let base = wire.suspend_ring(0);
        guest.set_regions(&wire);
        guest.start_ring(&wire, base);

        guest.wait(0);
        assert_eq!(read::<1>(&guest.ram, STATUS), [0]);
        assert!(!guest.is_marked());
    }
}

#[test]
fn a_front_end_that_waits_for_its_turn_has_done_what_the_first_one_left() {
    for layout in [0, RING_PACKED] {
        let (succession, guest) = (Succession::default(), Guest::new(layout));
        succession.allow_once(None);
        let rig = Rig::with(Environment { drive: slow_drive(), succession, ..Environment::default() });
        let (after, before) = bases(layout);
        let first = guest.start(&rig, before);
        guest.request(BLK_OUT, 0);
        let next = guest.start(&rig, before);

        assert_eq!(first.suspend_ring(0), after);

        guest.wait(0);
        assert_eq!(read::<1>(&guest.ram, STATUS), [0]);
        assert!(!guest.is_marked());
        drop(first);
        assert_eq!(next.stop_ring(0), if layout == RING_PACKED { 0x8003_8003 } else { 1 });
    }
}

#[test]
fn a_reset_forgets_what_was_suspended() {
    let (rig, guest) = (slow(), Guest::new(0));
    let wire = guest.start(&rig, 0);
    guest.request(BLK_IN, 0);
    wire.suspend_ring(0);
    assert_eq!(wire.call(SET_STATUS, &words(&[0]), &[]), 0);
    assert_eq!(wire.call(SET_FEATURES, &words(&[FEATURES]), &[]), 0);

    // The same regions, and a ring that begins anew.
    guest.ram.write_all_at(&[0; 0x4000], 0).unwrap();
    guest.set_regions(&wire);
    guest.start_ring(&wire, 0);

    assert_eq!((wire.stop_ring(0), read::<1>(&guest.ram, STATUS)), (0, [0xff]));
    assert!(!guest.is_marked());
}

#[test]
fn get_vring_base_still_waits_for_the_drive() {
    for layout in [0, RING_PACKED] {
        let (rig, guest) = (slow(), Guest::new(layout));
        let wire = guest.start(&rig, bases(layout).1);
        guest.request(BLK_IN, 0);

        wire.stop_ring(0);

        assert_eq!(read::<1>(&guest.ram, STATUS), [0]);
        assert!(!guest.is_marked());
    }
}

#[test]
fn a_ring_without_a_region_is_drained() {
    let rig = slow();
    let (ram, events, wire) = (memory("ram", RAM.len), ring_events(), rig.connect());
    wire.negotiate_with(FEATURES, ALL);
    assert_eq!(wire.add_region(RAM, ram.as_fd()), 0);
    put(&ram, BLK_IN, 0);
    send_all(&wire, &setup_messages(&events));
    assert_eq!(wire.call(SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    // The ring may have been stopped before it took the request.
    while wire.suspend_ring(0) == 0 {
        send_all(&wire, &setup_messages(&events));
    }

    assert_eq!((read::<1>(&ram, STATUS), read::<2>(&ram, USED + 2)), ([0], [1, 0]));
}

#[test]
fn the_message_needs_its_feature_and_the_feature_needs_the_regions() {
    let rig = Rig::new();
    for protocol in [PROTOCOL, PROTOCOL | INFLIGHT_SHMFD, PROTOCOL | INFLIGHT_SHMFD | BASE_INFLIGHT] {
        let wire = rig.connect();
        wire.negotiate_with(FEATURES, protocol);
        wire.send(GET_VRING_BASE_SKIP_DRAIN, &state(0, 0), &[]);
        assert!(wire.is_closed(), "{protocol:#x}");
    }
    for alone in
        [PROTOCOL | BASE_INFLIGHT, PROTOCOL | INFLIGHT_SHMFD | SKIP_DRAIN, PROTOCOL | BASE_INFLIGHT | SKIP_DRAIN]
    {
        let wire = rig.connect();
        wire.negotiate();
        assert_eq!(wire.call(SET_PROTOCOL_FEATURES, &words(&[alone]), &[]), 1, "{alone:#x}");
    }
}

#[test]
fn a_message_that_makes_no_sense_ends_the_connection() {
    let rig = Rig::new();
    for payload in [state(4, 0), state(u32::MAX, 0), vec![], vec![0; 4], vec![0; 16]] {
        let wire = rig.connect();
        wire.negotiate_with(FEATURES, ALL);
        wire.send(GET_VRING_BASE_SKIP_DRAIN, &payload, &[]);
        assert!(wire.is_closed(), "{payload:?}");
    }
    let (wire, _ram, _events) = running(&rig);
    assert_eq!(wire.stop_ring(0), 0, "others are served");
}
