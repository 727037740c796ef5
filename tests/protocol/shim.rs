//! What the VM's process hears of the device, through a real shim in this process, and what happens where it hears nothing.

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

use crate::mistakes::{lines, listen_to_the_log};
use crate::rig::{Around, Change, Rig, memory};
use crate::vmm::{Answer, Socket};
use crate::wire::{Place, Wire};

const PAGE: u64 = 4096;

/// DMA that snoops the caches, whatever happens.
const COHERENT: Facts = Facts {
    snoop_enforced: true,
    no_snoop: NoSnoop::NeverSet,
    policy: coherency::Policy::Suppress,
    personality: Personality::Mediated,
    cache_ops: CacheOps::Clflush,
    shim: false,
};
/// DMA that goes behind them.
const FLUSHED: Facts = Facts { snoop_enforced: false, policy: coherency::Policy::Assume, ..COHERENT };

/// One page, at page 16, 32, 48 … of guest and front-end memory.
fn page(number: u64) -> Place {
    Place { gpa: number * 16 * PAGE, len: PAGE, qva: (1 << 40) + number * 16 * PAGE, offset: number * PAGE }
}

/// A front-end that has agreed on features.
fn front_end(rig: &Rig) -> Wire {
    let wire = rig.connect();
    wire.negotiate();
    wire
}

fn registered(socket: &Path) -> u16 {
    Client::connect(socket, Client::DEFAULT_TIMEOUT).unwrap().1.registered
}

/// A memory file whose pages are there, as they are once they have been pinned.
fn allocated(name: &str, bytes: u64) -> File {
    let file = memory(name, bytes);
    fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
    file
}

fn punch(file: &File) {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, PAGE).unwrap();
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "not seen: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_device_is_registered_before_the_first_map_and_unregistered_after_the_last_unmap() {
    let socket = Socket::new();
    let vm = socket.serve();
    let changes = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&changes);
    let on_change = Box::new(move |change| noted.lock().unwrap().push((change, vm.pinned())));
    let rig = Rig::in_a(Around { on_change, ..socket.around("ordered", COHERENT) });
    let file = memory("ram", 16 * PAGE);
    assert_eq!(registered(&socket.path), 0, "no front-end, no registration");

    let wire = front_end(&rig);
    assert_eq!(registered(&socket.path), 1);
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    assert_eq!(wire.remove_region(page(1)), 0);
    assert_eq!(wire.add_region(page(2), file.as_fd()), 0);
    assert_eq!(registered(&socket.path), 1, "all the time");
    drop(wire);
    // The next one is served only after the last one's affairs are settled.
    let next = rig.connect();
    next.settle();
    assert_eq!(registered(&socket.path), 1, "the next one's alone");
    drop(next);
    rig.stop();
    assert_eq!(registered(&socket.path), 0);
    assert!(!vm.pinned());
    use Change::{Maps, Unmapped};
    let changes = changes.lock().unwrap();
    assert_eq!(*changes, [(Maps, true), (Unmapped, true), (Maps, true), (Unmapped, true)]);
}

#[test]
fn a_shim_that_comes_after_the_front_end_is_found_before_anything_else_happens() {
    // As with QEMU: it connects, then makes its VM, and with it the shim, and only then says something.
    let socket = Socket::new();
    let rig = Rig::in_a(socket.around("early", COHERENT));
    let wire = rig.connect();
    wire.settle();

    let vm = socket.serve();
    assert!(!vm.pinned());
    wire.settle();

    assert!(vm.pinned());
}

#[test]
fn without_a_shim_memory_is_mapped_and_there_is_one_warning() {
    listen_to_the_log();
    for (name, facts) in [("alone-coherent", COHERENT), ("alone-flushed", FLUSHED)] {
        let socket = Socket::new();
        let rig = Rig::in_a(socket.around(name, facts));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
        assert_eq!(lines(&[name]), 0, "there is time until memory comes");

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
        assert_eq!(wire.add_region(page(2), file.as_fd()), 0);

        assert_eq!(lines(&[name, "LD_PRELOAD=libkvm_vfio_shim.so", "not kept from being discarded"]), 1);
        assert_eq!(lines(&[name]), 1);
    }
    assert_eq!(lines(&["alone-flushed", "KVM is not told"]), 1);
}

#[test]
fn a_service_that_needs_kvm_told_gets_no_memory_without_a_shim() {
    listen_to_the_log();
    let socket = Socket::new();
    let facts = Facts { personality: Personality::WholeFunction, ..FLUSHED };
    let rig = Rig::in_a(socket.around("needy", facts));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 1);

    assert_eq!(rig.guest_memory(), []);
    assert_eq!(lines(&["refused: needy", "KVM cannot be told", "start QEMU with the shim preloaded"]), 1);
}

#[test]
fn a_refused_registration_refuses_memory_where_kvm_is_to_be_told() {
    listen_to_the_log();
    let socket = Socket::new();
    let vm = socket.serve();
    vm.vcpu_enters();
    let changes = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&changes);
    let on_change = Box::new(move |_| *counted.lock().unwrap() += 1);
    let rig = Rig::in_a(Around { on_change, ..socket.around("locked", FLUSHED) });
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 1);
    assert_eq!(wire.set_table(&[(page(1), file.as_fd())]), 1);

    assert_eq!((rig.guest_memory(), *changes.lock().unwrap()), (vec![], 0));
    assert!(!vm.pinned(), "what was refused left nothing behind");
    let reason = ["locked", "the VM has been running for", "`lock`", "KVM_VFIO_SHIM_POLICY=dynamic", "--kvm-socket"];
    assert_eq!(lines(&reason), 3, "when it was met, and for each message");
    wire.settle();
}

#[test]
fn a_file_that_kvm_cannot_be_given_refuses_memory() {
    let socket = Socket::new();
    let vm = socket.serve();
    let rig = Rig::in_a(socket.around("null", FLUSHED));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
    assert_eq!(wire.add_region(page(1), file.as_fd()), 1, "the shim takes no /dev/null");
    assert!(!vm.pinned());

    let shim =
        Shim { socket: socket.path.clone(), device: "gone".into(), facts: FLUSHED, file: Some("/no/such".into()) };
    let rig = Rig::in_a(Around { vmm: Vmm::with_shim(shim), ..Around::default() });
    assert_eq!(front_end(&rig).add_region(page(1), file.as_fd()), 1, "there is none to send");
}

#[test]
fn kvm_is_told_of_a_flushed_device_and_of_no_other_where_there_is_a_kvm() {
    let agrees: Answer = |_, reply| (reply.to_bytes().into(), true);
    let has_no_vm: Answer = |kind, reply| {
        let refusal = Reply { outcome: Err(Reason::NoVm.into()), ..reply };
        let reply = if kind == Kind::Register(Dma::NonCoherent) { refusal } else { reply };
        (reply.to_bytes().into(), true)
    };
    let [coherent, told] = [Dma::Coherent, Dma::NonCoherent].map(Kind::Register);
    for (facts, answer, wanted) in [
        (COHERENT, agrees, vec![Kind::Hello, coherent, Kind::Unregister(7)]),
        (FLUSHED, agrees, vec![Kind::Hello, told, Kind::Unregister(7)]),
        (FLUSHED, has_no_vm, vec![Kind::Hello, told, coherent, Kind::Unregister(7)]),
    ] {
        let socket = Socket::new();
        let heard = socket.pretend(1, answer);
        let rig = Rig::in_a(socket.around("told", facts));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
        rig.stop();

        assert_eq!(*heard.lock().unwrap(), [wanted]);
    }
}

#[test]
fn a_lock_does_not_matter_to_a_device_that_kvm_need_not_know() {
    for (facts, file) in [(COHERENT, Some("/dev/null".into())), (FLUSHED, None)] {
        let socket = Socket::new();
        let vm = socket.serve();
        vm.vcpu_enters();
        let vmm = Vmm::with_shim(Shim { socket: socket.path.clone(), device: "harmless".into(), facts, file });
        let rig = Rig::in_a(Around { vmm, ..Around::default() });
        let ram = memory("ram", 16 * PAGE);

        assert_eq!(front_end(&rig).add_region(page(1), ram.as_fd()), 0);

        wait_until("the front-end has left", || !vm.pinned());
    }
}

#[test]
fn a_shim_that_is_none_or_another_is_done_without_and_asked_once() {
    listen_to_the_log();
    let version: Answer = |_, reply| {
        let mut bytes = reply.to_bytes();
        bytes[4] = 9;
        (bytes.into(), true)
    };
    let cases: [(&str, Answer, &str); 3] = [
        ("other-version", version, "it speaks version 9"),
        ("noise", |_, _| (vec![1, 2, 3], true), "malformed answer"),
        ("closes", |_, _| (vec![], false), "the connection is closed"),
    ];
    for (name, answer, reason) in cases {
        let socket = Socket::new();
        let heard = socket.pretend(2, answer);
        let rig = Rig::in_a(socket.around(name, FLUSHED));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        assert_eq!(wire.add_region(page(1), file.as_fd()), 0, "{name}");
        assert_eq!(wire.add_region(page(2), file.as_fd()), 0, "{name}");

        assert_eq!(*heard.lock().unwrap(), [[Kind::Hello]], "{name}");
        assert_eq!(lines(&[name, reason, "KVM is not told"]), 1, "{name}");
    }
}

#[test]
fn a_silent_shim_holds_a_front_end_up_once() {
    listen_to_the_log();
    let socket = Socket::new();
    let listener = socket.listen();
    let rig = Rig::in_a(socket.around("silent", FLUSHED));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);

    assert_eq!(lines(&["silent", "no answer within 5s", "KVM is not told"]), 1);
    rustix::io::ioctl_fionbio(&listener, true).unwrap();
    assert!(accept(&listener).is_ok());
    assert!(accept(&listener).is_err(), "asked once");
}

#[test]
fn a_shim_that_goes_is_looked_for_once_more_and_the_front_end_served_on() {
    listen_to_the_log();
    const SESSION: [Kind; 2] = [Kind::Hello, Kind::Register(Dma::Coherent)];
    let drops: Answer = |kind, reply| (reply.to_bytes().into(), kind == Kind::Hello);
    for (name, connections, reason) in
        [("gone-for-good", 1, "Connection refused"), ("drops-us-twice", 3, "the connection is closed")]
    {
        let socket = Socket::new();
        let heard = socket.pretend(connections, drops);
        let rig = Rig::in_a(socket.around(name, COHERENT));
        let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));

        wait_until("it is given up", || lines(&[name, reason, "not kept from being discarded"]) == 1);

        assert_eq!(heard.lock().unwrap()[..], vec![SESSION; connections.min(2)][..], "{name}");
        assert_eq!(wire.add_region(page(1), file.as_fd()), 0, "{name}");
        assert_eq!(rig.guest_memory(), [(page(1).gpa, PAGE)], "{name}");
    }
}

#[test]
fn a_device_that_the_host_takes_back_is_unregistered_though_the_front_end_stays() {
    let socket = Socket::new();
    let vm = socket.serve();
    let rig = Rig::in_a(socket.around("unbound", COHERENT));
    let (wire, file) = (front_end(&rig), memory("ram", 16 * PAGE));
    assert_eq!(wire.add_region(page(1), file.as_fd()), 0);
    assert!(vm.pinned());

    rig.ask_back();

    wait_until("it is unregistered", || !vm.pinned());
    assert_eq!(wire.add_region(page(2), file.as_fd()), 0);
    drop(wire);
    front_end(&rig).settle();
    assert_eq!(registered(&socket.path), 0, "for good");
}

#[test]
fn a_hole_in_pinned_memory_is_an_alarm_unless_a_shim_keeps_it_or_nothing_is_pinned() {
    listen_to_the_log();
    let kept = Socket::new();
    kept.serve();
    let file = allocated("ram", 4 * PAGE);
    let keeping = Rig::in_a(Around { pins: true, ..kept.around("kept", COHERENT) });
    let emulated = Rig::in_a(Around::default());
    let watching = Rig::in_a(Around { pins: true, ..Around::default() });
    let place = |gpa| Place { gpa, len: 4 * PAGE, qva: 1 << 40, offset: 0 };
    let rigs = [(keeping, 0x7100_0000), (emulated, 0x7200_0000), (watching, 0x7300_0000)];
    let wires = rigs.each_ref().map(|(rig, gpa)| {
        let wire = front_end(rig);
        assert_eq!(wire.add_region(place(*gpa), file.as_fd()), 0);
        wire
    });

    punch(&file);

    // The others would have looked before this one.
    wait_until("an alarm", || lines(&["0x73000000+16K", "4K of region", "virtio-balloon", "--kvm-socket"]) == 1);
    assert_eq!(lines(&["0x71000000"]) + lines(&["0x72000000"]), 0);
    drop(wires);
}
