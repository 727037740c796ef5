//! A front-end that waits while another one is served: the registrations with KVM, and what is refused meanwhile.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use vhost_device_vfio::vhost_user::Succession;

use crate::mistakes::{capture_log, logged_lines};
use crate::rig::{Change, Environment, Rig, memory};
use crate::shim::COHERENT;
use crate::vmm::ShimSocket;
use crate::wire::request::SET_CONFIG;
use crate::wire::{MemoryRegion, Wire};

const PAGE: u64 = 4096;
const REGION: MemoryRegion = MemoryRegion { gpa: 0, len: PAGE, qva: 1 << 40, offset: 0 };

fn front_end(rig: &Rig) -> Wire {
    let wire = rig.connect();
    wire.negotiate();
    wire
}

#[test]
fn the_next_vm_is_told_before_its_memory_is_mapped_and_the_former_one_untold_after_its_last_unmap() {
    let sockets = [ShimSocket::new(), ShimSocket::new()];
    let vms = [sockets[0].serve(), sockets[1].serve()];
    let changes = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&changes);
    let on_change = Box::new(move |change| log.lock().unwrap().push((change, vms[0].pinned(), vms[1].pinned())));
    let succession = Succession::default();
    succession.allow_once(Some(sockets[1].path.clone()));
    let environment = sockets[0].environment("moves", COHERENT);
    let rig = Rig::with(Environment { on_change, succession, ..environment });
    let files = [memory("first", PAGE), memory("next", PAGE)];
    let first = front_end(&rig);
    assert_eq!(first.add_region(REGION, files[0].as_fd()), 0);

    let next = front_end(&rig);
    assert_eq!(next.add_region(REGION, files[1].as_fd()), 0, "at the same address");
    assert!(vms[0].pinned() && vms[1].pinned());
    drop(first);
    while vms[0].pinned() {
        next.sync();
    }
    // It is not answered before the function has been moved.
    next.sync();

    assert_eq!(rig.guest_memory(), [(0, PAGE)]);
    assert!(vms[1].pinned());
    drop(next);
    rig.stop();
    assert!(!vms[1].pinned());
    use Change::{AfterUnmap, BeforeMap};
    let changes = changes.lock().unwrap();
    let expected =
        [(BeforeMap, true, false), (BeforeMap, true, true), (AfterUnmap, true, true), (AfterUnmap, false, true)];
    assert_eq!(*changes, expected, "the change, and whether the first and the next VM were told");
}

#[test]
fn a_vm_whose_shim_is_not_named_does_not_wait() {
    capture_log();
    let socket = ShimSocket::new();
    socket.serve();
    let succession = Succession::default();
    succession.allow_always();
    let rig = Rig::with(Environment { succession, ..socket.environment("unnamed", COHERENT) });
    let first = front_end(&rig);

    assert!(rig.connect().is_closed());

    first.sync();
    assert_eq!(
        logged_lines(&["was to wait for its turn: the shim of its VM is not known; let it wait with ctl successor"]),
        1
    );
}

#[test]
fn a_front_end_that_waits_may_not_write_the_configuration_space() {
    let succession = Succession::default();
    succession.allow_always();
    let rig = Rig::with(Environment { succession, ..Environment::default() });
    let first = front_end(&rig);
    let next = front_end(&rig);
    let payload = [&32_u32.to_ne_bytes()[..], &1_u32.to_ne_bytes(), &0_u32.to_ne_bytes(), &[0]].concat();

    assert_eq!(next.call(SET_CONFIG, &payload, &[]), 1);

    assert_eq!(first.call(SET_CONFIG, &payload, &[]), 0);
    next.sync();
}
