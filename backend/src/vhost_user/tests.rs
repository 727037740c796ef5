//! Two sessions on one device: one that is served, and one that waits to take its place. Their memory is at the same guest address.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserMemoryRegion, VhostUserVringAddrFlags};

use super::logs::Logs;
use super::session::Session;
use super::vring::{Addresses, Vring};
use super::{Device, VirtioFeatures};
use crate::addr::{IovaSlice, Qva};
use crate::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use crate::emulated::{Machine, Options};
use crate::engine::{self, Engine, Layout};
use crate::hardware::{AddressSpace, MapError, SecondSpace};
use crate::kvm::Vmm;
use crate::socket::Peer;

const GPA: u64 = 1 << 20;
const BYTES: u64 = 64 << 10;
/// Offsets in the memory.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const DATA: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const UNTOUCHED: [u8; 512] = [0xff; 512];

fn device(machine: &Machine) -> Device {
    let space = machine.space();
    let options = NvmeOptions {
        namespaces: Vec::new(),
        queues: 1,
        read_only: false,
        interrupts: InterruptPolicy::Auto,
        avoid: Vec::new(),
    };
    let driver = Nvme::bring_up(machine.function(), Arc::clone(&space), options).unwrap();
    let (spin, drain_timeout) = (Duration::ZERO, Duration::from_secs(5));
    let (watch, placement) = (engine::WatchdogOptions::default(), Default::default());
    let options = engine::Options { rings: 1, spin, drain_timeout, watch, placement };
    let engine = Engine::start(Box::new(driver), &space, options).unwrap();
    let withheld = VirtioFeatures::empty();
    Device { engine, space, slice: IovaSlice::WHOLE, queues: 1, vmm: Vmm::without_shim(), withheld }
}

/// Guest memory with one request in its ring: a read of the first sector, which is zero.
struct Memory(File);

impl Memory {
    fn new() -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, BYTES).unwrap();
        let memory = Self(file);
        for (n, (at, len, flags, next)) in
            (0..).zip([(HEADER, 16_u32, 1_u16, 1_u16), (DATA, 512, 3, 2), (STATUS, 1, 2, 0)])
        {
            memory.write(n * 16, &(GPA + at).to_le_bytes());
            memory.write(n * 16 + 8, &len.to_le_bytes());
            memory.write(n * 16 + 12, &flags.to_le_bytes());
            memory.write(n * 16 + 14, &next.to_le_bytes());
        }
        memory.write(DATA, &UNTOUCHED);
        memory.write(AVAIL + 2, &1_u16.to_le_bytes());
        memory
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Waits until the request has completed, and returns what was read.
    fn completed(&self) -> [u8; 512] {
        let start = Instant::now();
        while self.read::<2>(USED + 2) == [0; 2] {
            assert!(start.elapsed() < Duration::from_secs(20), "no request completes");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.read(DATA)
    }

    /// Offers the same request once more.
    fn offer_again(&self) {
        self.write(DATA, &UNTOUCHED);
        self.write(USED + 2, &[0; 2]);
    }
}

fn features(flush: bool) -> u64 {
    let features = VirtioFeatures::VERSION_1 | VirtioFeatures::PROTOCOL_FEATURES;
    (if flush { features | VirtioFeatures::FLUSH } else { features }).bits()
}

fn share_memory(session: &mut Session<'_>, memory: &Memory) {
    session.set_features(features(true)).unwrap();
    let region = VhostUserMemoryRegion::new(GPA, BYTES, GPA, 0);
    session.set_mem_table(&[region], vec![memory.0.try_clone().unwrap()], None).unwrap();
}

fn run_ring(session: &mut Session<'_>) {
    let event = || Some(File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap()));
    session.set_vring_num(0, 8).unwrap();
    let none = VhostUserVringAddrFlags::empty();
    session.set_vring_addr(0, none, GPA, GPA + USED, GPA + AVAIL, 0).unwrap();
    session.set_vring_base(0, 0).unwrap();
    session.set_vring_call(0, event()).unwrap();
    session.set_vring_enable(0, true).unwrap();
    session.set_vring_kick(0, event()).unwrap();
}

/// A second space that does something else first.
struct Instrumented<'a> {
    inner: Arc<dyn SecondSpace>,
    before: Box<dyn Fn() -> Result<(), MapError> + Send + Sync + 'a>,
}

impl SecondSpace for Instrumented<'_> {
    fn space(&self) -> Arc<dyn AddressSpace> {
        self.inner.space()
    }

    fn exchange(&self) -> Result<(), MapError> {
        (self.before)()?;
        self.inner.exchange()
    }
}

/// Runs `test` with a session that is served, one that waits, and the space of the latter; also with their memory.
fn with_sessions(
    test: impl for<'d> FnOnce((&mut Session<'d>, &Memory), (&mut Session<'d>, &Memory), &Arc<dyn SecondSpace>, &'d Device),
) {
    let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
    let (device, logs, (one, _other)) = (device(&machine), Logs::new(), UnixStream::pair().unwrap());
    let peer = || Peer::of(&one).unwrap();
    let second = device.space.second().unwrap();
    let mut served = Session::new(&device, &logs, peer());
    let mut waits = Session::of_next((&device, &logs), peer(), second.space(), None);
    let memory = [Memory::new(), Memory::new()];
    share_memory(&mut served, &memory[0]);
    share_memory(&mut waits, &memory[1]);

    test((&mut served, &memory[0]), (&mut waits, &memory[1]), &second, &device);

    served.close().unwrap();
    waits.close().unwrap();
    drop((served, waits, second));
    assert_eq!(machine.iommu().fault_count(), 0);
    device.engine.shut_down();
}

#[test]
fn what_is_withheld_is_neither_offered_nor_accepted() {
    let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
    let device = Device { withheld: VirtioFeatures::RING_PACKED, ..device(&machine) };
    let (logs, (one, _other)) = (Logs::new(), UnixStream::pair().unwrap());
    let mut session = Session::new(&device, &logs, Peer::of(&one).unwrap());

    let offered = VirtioFeatures::from_bits_retain(session.get_features().unwrap());

    assert!(offered.contains(VirtioFeatures::VERSION_1) && !offered.contains(VirtioFeatures::RING_PACKED));
    assert!(session.set_features(features(true) | VirtioFeatures::RING_PACKED.bits()).is_err());
    session.set_features(features(true)).unwrap();
    session.close().unwrap();
    drop(session);
    device.engine.shut_down();
}

#[test]
fn a_packed_ring_at_base_zero_is_doubtful_and_no_other_is() {
    let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
    let device = device(&machine);
    let mut ring = Vring::new(0);
    let part = |at| Qva(GPA + at);
    ring.set_size(8, None).unwrap();
    ring.set_addresses(Addresses { desc: part(0), avail: part(AVAIL), used: part(USED) }).unwrap();
    ring.set_base(0, None).unwrap();
    assert!(!ring.is_doubtful(Some(Layout::Packed)), "it is not complete");

    ring.set_kick(&device.engine, None).unwrap();

    assert!(ring.is_doubtful(Some(Layout::Packed)));
    assert!(!ring.is_doubtful(Some(Layout::Split)) && !ring.is_doubtful(None));
    ring.set_base(Layout::Packed.first_base(), None).unwrap();
    assert!(!ring.is_doubtful(Some(Layout::Packed)));
    device.engine.shut_down();
}

#[test]
fn the_next_ring_runs_on_its_own_memory_and_only_after_the_exchange() {
    with_sessions(|(served, first), (waits, next), second, _| {
        run_ring(served);
        assert_eq!(first.completed(), [0; 512]);
        first.write(DATA, &UNTOUCHED);
        run_ring(waits);
        assert!(waits.is_ready() && !served.has_stopped());
        served.get_vring_base(0).unwrap();
        assert!(served.has_stopped());
        let untouched = || {
            assert_eq!(next.read::<2>(USED + 2), [0; 2], "no ring runs");
            Ok(())
        };
        let second = Instrumented { inner: Arc::clone(second), before: Box::new(untouched) };

        waits.succeed(Some(served), &second).unwrap();

        assert_eq!(next.completed(), [0; 512]);
        assert_eq!(first.read::<512>(DATA), UNTOUCHED, "not a byte of it is reached any more");
    });
}

#[test]
fn a_device_that_cannot_be_moved_serves_the_first_one_as_before() {
    with_sessions(|(served, first), (waits, next), second, _| {
        run_ring(served);
        first.completed();
        run_ring(waits);
        served.get_vring_base(0).unwrap();
        let failure = || Err(MapError::NoSecondSpace { why: "of this test".into() });
        let second = Instrumented { inner: Arc::clone(second), before: Box::new(failure) };

        let error = waits.succeed(Some(&mut *served), &second).unwrap_err();
        first.offer_again();
        run_ring(served);

        assert!(error.to_string().contains("of this test"), "{error}");
        assert_eq!(first.completed(), [0; 512]);
        assert!(waits.is_ready() && next.read::<512>(DATA) == UNTOUCHED);
    });
}

#[test]
fn a_front_end_that_waits_does_not_change_the_write_cache() {
    with_sessions(|(served, first), (waits, _), second, device| {
        run_ring(served);
        first.completed();

        waits.set_features(features(false)).unwrap();
        let refused = waits.set_config(32, &[0], VhostUserConfigFlags::WRITABLE).is_err();
        assert!(refused && device.engine.write_cache(), "the first one's setting");
        served.get_vring_base(0).unwrap();
        waits.succeed(Some(served), &**second).unwrap();

        assert!(!device.engine.write_cache(), "the next one cannot flush");
    });
}

#[test]
fn the_next_one_goes_on_with_the_write_cache_as_its_guest_has_set_it() {
    with_sessions(|(served, first), (waits, _), second, device| {
        run_ring(served);
        first.completed();
        served.set_config(32, &[0], VhostUserConfigFlags::WRITABLE).unwrap();
        served.get_vring_base(0).unwrap();

        waits.succeed(Some(served), &**second).unwrap();

        assert!(!device.engine.write_cache());
    });
}
