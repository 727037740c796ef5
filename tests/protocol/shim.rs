//! Registration of the device with a KVM shim, which runs in this process, and serving without one.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_vfio_shim::wire::{Kind, Reply};
use kvm_vfio_shim::{Client, Dma, Reason};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::net::accept;
use vhost_device_vfio::coherency::{self, CacheOps, Facts, NoSnoop, Personality};
use vhost_device_vfio::kvm::{Shim, Vmm};

use crate::mistakes::{capture_log, logged_lines};
use crate::rig::{Change, Environment, Rig, memory};
use crate::vmm::{AnswerFn, ShimSocket};
use crate::wire::{MemoryRegion, Wire};

const PAGE: u64 = 4096;

/// All DMA snoops the caches.
pub(crate) const COHERENT: Facts = Facts {
    snoop_enforced: true,
    no_snoop: NoSnoop::NeverSet,
    policy: coherency::Policy::Suppress,
    personality: Personality::Mediated,
    cache_ops: CacheOps::Clflush,
    shim: false,
    staging: true,
};
/// DMA may bypass the caches.
const FLUSHED: Facts = Facts { snoop_enforced: false, policy: coherency::Policy::Assume, ..COHERENT };

/// A region of one page, at page 16 × `number` of guest and front-end memory.
fn page(number: u64) -> MemoryRegion {
    MemoryRegion { gpa: number * 16 * PAGE, len: PAGE, qva: (1 << 40) + number * 16 * PAGE, offset: number * PAGE }
}

/// A front-end that has negotiated features.
fn front_end(rig: &Rig) -> Wire {
    let wire = rig.connect();
    wire.negotiate();
    wire
}

fn registered(socket: &Path) -> u16 {
    Client::connect(socket, Client::DEFAULT_TIMEOUT).unwrap().1.registered
}

/// A memory file with allocated pages, as after pinning.
fn allocated(name: &str, bytes: u64) -> File {
    let file = memory(name, bytes);
    fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
    file
}

fn punch(file: &File) {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, PAGE).unwrap();
}

fn wait_until(condition: &str, holds: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "timed out: {condition}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_device_is_registered_before_the_first_map_and_unregistered_after_the_last_unmap() {
    let socket = ShimSocket::new();
    let vm = socket.serve();
    let changes = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&changes);
    let on_change = Box::new(move |change| log.lock().unwrap().push((change, vm.pinned())));
    let rig = Rig::with(Environment { on_change, ..socket.environment("ordered", COHERENT) });
    let file = memory("ram", 16 * PAGE);
    assert_eq!(registered(&socket.path), 0, "no front-end, no registration");

    let wire = front_end(&rig);
    assert_eq!(registered(&socket.path), 1);
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    assert_eq!(wire.remove_region(page(1)), 0);
    assert_eq!(wire.add_region(page(2), file.as_fd()), 0);
    assert_eq!(registered(&socket.path), 1, "still");
    drop(wire);
    // The next front-end is served only after the cleanup of the last one.
    let next = rig.connect();
    next.sync();
    assert_eq!(registered(&socket.path), 1, "only that of the next front-end");
    drop(next);
    rig.stop();
    assert_eq!(registered(&socket.path), 0);
    assert!(!vm.pinned());
    use Change::{AfterUnmap, BeforeMap};
    let changes = changes.lock().unwrap();
    assert_eq!(*changes, [(BeforeMap, true), (AfterUnmap, true), (BeforeMap, true), (AfterUnmap, true)]);
}

#[test]
fn a_shim_that_starts_after_the_front_end_connects_is_found_before_the_next_message() {
    // QEMU connects before it creates its VM, and with it the shim.
    let socket = ShimSocket::new();
    let rig = Rig::with(socket.environment("early", COHERENT));
    let wire = rig.connect();
    wire.sync();

    let vm = socket.serve();
    assert!(!vm.pinned());
    wire.sync();

    assert!(vm.pinned());
}

#[test]
fn without_a_shim_memory_is_mapped_and_there_is_one_warning() {
    capture_log();
    for (name, facts) in [("alone-coherent", COHERENT), ("alone-flushed", FLUSHED)] {
        let socket = ShimSocket::new();
        let rig = Rig::with(socket.environment(name, facts));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
        assert_eq!(logged_lines(&[name]), 0, "no warning before memory is added");

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
        assert_eq!(wire.add_region(page(2), file.as_fd()), 0);

        assert_eq!(logged_lines(&[name, "LD_PRELOAD=libkvm_vfio_shim.so", "not kept from being discarded"]), 1);
        assert_eq!(logged_lines(&[name]), 1);
    }
    assert_eq!(logged_lines(&["alone-flushed", "KVM is not told"]), 1);
}

#[test]
fn memory_is_refused_without_a_shim_if_kvm_must_know_the_device() {
    capture_log();
    let socket = ShimSocket::new();
    let facts = Facts { personality: Personality::WholeFunction, ..FLUSHED };
    let rig = Rig::with(socket.environment("needy", facts));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 1);

    assert_eq!(rig.guest_memory(), []);
    assert_eq!(logged_lines(&["refused: needy", "KVM cannot be told", "start QEMU with the shim preloaded"]), 1);
}

#[test]
fn memory_is_refused_after_a_refused_registration_if_kvm_must_know_the_device() {
    capture_log();
    let socket = ShimSocket::new();
    let vm = socket.serve();
    vm.vcpu_enters();
    let changes = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&changes);
    let on_change = Box::new(move |_| *counted.lock().unwrap() += 1);
    let rig = Rig::with(Environment { on_change, ..socket.environment("locked", FLUSHED) });
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 1);
    assert_eq!(wire.set_table(&[(page(1), file.as_fd())]), 1);

    assert_eq!((rig.guest_memory(), *changes.lock().unwrap()), (vec![], 0));
    assert!(!vm.pinned(), "not registered");
    let reason = ["locked", "the VM has been running for", "`lock`", "KVM_VFIO_SHIM_POLICY=dynamic", "--kvm-socket"];
    assert_eq!(logged_lines(&reason), 3, "at the registration, and for each message");
    wire.sync();
}

#[test]
fn memory_is_refused_if_the_device_file_cannot_be_passed_to_kvm() {
    let socket = ShimSocket::new();
    let vm = socket.serve();
    let rig = Rig::with(socket.environment("null", FLUSHED));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
    assert_eq!(wire.add_region(page(1), file.as_fd()), 1, "the shim refuses /dev/null");
    assert!(!vm.pinned());

    let shim =
        Shim { socket: socket.path.clone(), device: "missing".into(), facts: FLUSHED, file: Some("/no/such".into()) };
    let rig = Rig::with(Environment { vmm: Vmm::with_shim(shim), ..Environment::default() });
    assert_eq!(front_end(&rig).add_region(page(1), file.as_fd()), 1, "the file does not exist");
}

#[test]
fn only_a_flushed_device_is_registered_as_non_coherent_and_only_if_there_is_a_kvm_vm() {
    let accepts: AnswerFn = |_, reply| (reply.to_bytes().into(), true);
    let has_no_vm: AnswerFn = |kind, reply| {
        let refusal = Reply { outcome: Err(Reason::NoVm.into()), ..reply };
        let reply = if kind == Kind::Register(Dma::NonCoherent) { refusal } else { reply };
        (reply.to_bytes().into(), true)
    };
    let [coherent, non_coherent] = [Dma::Coherent, Dma::NonCoherent].map(Kind::Register);
    for (facts, answer, expected) in [
        (COHERENT, accepts, vec![Kind::Hello, coherent, Kind::Unregister(7)]),
        (FLUSHED, accepts, vec![Kind::Hello, non_coherent, Kind::Unregister(7)]),
        (FLUSHED, has_no_vm, vec![Kind::Hello, non_coherent, coherent, Kind::Unregister(7)]),
    ] {
        let socket = ShimSocket::new();
        let received = socket.imitate(1, answer);
        let rig = Rig::with(socket.environment("registered", facts));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
        rig.stop();

        assert_eq!(*received.lock().unwrap(), [expected]);
    }
}

#[test]
fn the_lock_policy_does_not_affect_a_device_that_kvm_need_not_know() {
    for (facts, file) in [(COHERENT, Some("/dev/null".into())), (FLUSHED, None)] {
        let socket = ShimSocket::new();
        let vm = socket.serve();
        vm.vcpu_enters();
        let vmm = Vmm::with_shim(Shim { socket: socket.path.clone(), device: "harmless".into(), facts, file });
        let rig = Rig::with(Environment { vmm, ..Environment::default() });
        let ram = memory("ram", 16 * PAGE);

        assert_eq!(front_end(&rig).add_region(page(1), ram.as_fd()), 0);

        wait_until("it is unregistered", || !vm.pinned());
    }
}

#[test]
fn a_front_end_is_served_without_an_incompatible_shim_after_one_attempt() {
    capture_log();
    let version: AnswerFn = |_, reply| {
        let mut bytes = reply.to_bytes();
        bytes[4] = 9;
        (bytes.into(), true)
    };
    let cases: [(&str, AnswerFn, &str); 3] = [
        ("other-version", version, "it speaks version 9"),
        ("noise", |_, _| (vec![1, 2, 3], true), "malformed answer"),
        ("closes", |_, _| (vec![], false), "the connection is closed"),
    ];
    for (name, answer, reason) in cases {
        let socket = ShimSocket::new();
        let received = socket.imitate(2, answer);
        let rig = Rig::with(socket.environment(name, FLUSHED));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0, "{name}");
        assert_eq!(wire.add_region(page(2), file.as_fd()), 0, "{name}");

        assert_eq!(*received.lock().unwrap(), [[Kind::Hello]], "{name}");
        assert_eq!(logged_lines(&[name, reason, "KVM is not told"]), 1, "{name}");
    }
}

#[test]
fn a_shim_that_does_not_answer_delays_the_front_end_once() {
    capture_log();
    let socket = ShimSocket::new();
    let listener = socket.listen();
    let rig = Rig::with(socket.environment("silent", FLUSHED));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);

    assert_eq!(logged_lines(&["silent", "no answer within 5s", "KVM is not told"]), 1);
    rustix::io::ioctl_fionbio(&listener, true).unwrap();
    assert!(accept(&listener).is_ok());
    assert!(accept(&listener).is_err(), "one attempt");
}

#[test]
fn after_a_lost_connection_to_the_shim_there_is_one_more_attempt_and_the_front_end_is_still_served() {
    capture_log();
    const SESSION: [Kind; 2] = [Kind::Hello, Kind::Register(Dma::Coherent)];
    let disconnects: AnswerFn = |kind, reply| (reply.to_bytes().into(), kind == Kind::Hello);
    for (name, connections, reason) in
        [("shim-exits", 1, "Connection refused"), ("shim-disconnects-twice", 3, "the connection is closed")]
    {
        let socket = ShimSocket::new();
        let received = socket.imitate(connections, disconnects);
        let rig = Rig::with(socket.environment(name, COHERENT));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        wait_until("the second attempt has failed", || {
            logged_lines(&[name, reason, "not kept from being discarded"]) == 1
        });

        assert_eq!(received.lock().unwrap()[..], vec![SESSION; connections.min(2)][..], "{name}");
        assert_eq!(wire.add_region(page(1), file.as_fd()), 0, "{name}");
        assert_eq!(rig.guest_memory(), [(page(1).gpa, PAGE)], "{name}");
    }
}

#[test]
fn a_device_released_to_the_host_is_unregistered_while_the_front_end_stays_connected() {
    let socket = ShimSocket::new();
    let vm = socket.serve();
    let rig = Rig::with(socket.environment("unbound", COHERENT));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    assert!(vm.pinned());

    rig.request_removal();

    wait_until("it is unregistered", || !vm.pinned());
    assert_eq!(wire.add_region(page(2), file.as_fd()), 0);
    drop(wire);
    front_end(&rig).sync();
    assert_eq!(registered(&socket.path), 0, "not registered again");
}

#[test]
fn a_hole_in_guest_memory_is_reported_unless_the_shim_blocks_discards_or_nothing_is_pinned() {
    capture_log();
    let socket = ShimSocket::new();
    socket.serve();
    let file = allocated("ram", 4 * PAGE);
    let blocking = Rig::with(Environment { pins: true, ..socket.environment("blocking", COHERENT) });
    let emulated = Rig::with(Environment::default());
    let monitoring = Rig::with(Environment { pins: true, ..Environment::default() });
    let region = |gpa| MemoryRegion { gpa, len: 4 * PAGE, qva: 1 << 40, offset: 0 };
    let rigs = [(blocking, 0x7100_0000), (emulated, 0x7200_0000), (monitoring, 0x7300_0000)];
    let wires = rigs.each_ref().map(|(rig, gpa)| {
        let wire = front_end(rig);
        assert_eq!(wire.add_region(region(*gpa), file.as_fd()), 0);
        wire
    });

    punch(&file);

    // The other two would have reported it before this one.
    wait_until("the report", || {
        logged_lines(&["0x73000000+16K", "4K of region", "virtio-balloon", "--kvm-socket"]) == 1
    });
    assert_eq!(logged_lines(&["0x71000000"]) + logged_lines(&["0x72000000"]), 0);
    drop(wires);
}
