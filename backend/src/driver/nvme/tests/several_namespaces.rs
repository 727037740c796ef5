//! Several namespaces of one controller, each with I/O queues of its own.

use std::os::fd::AsFd;

use super::rig::{Rig, nvme_options, run, small, span};
use crate::driver::nvme::{Avoid, InterruptPolicy, Nvme, NvmeErrorKind, NvmeOptions};
use crate::driver::{Command, Driver, Outcome, Queue};
use crate::emulated::{Fault, Options};
use crate::sys::Poller;

const READ: Command = Command::Read { block: 3, count: 1 };
const WRITE: Command = Command::Write { block: 3, count: 1 };

fn three() -> Options {
    Options { namespaces: 3, ..small() }
}

fn wanted(namespaces: &[u32], queues: u16) -> NvmeOptions {
    NvmeOptions { namespaces: namespaces.to_vec(), ..nvme_options(queues) }
}

fn up(rig: &Rig, namespaces: &[u32], queues: u16) -> (Nvme, Vec<Box<dyn Queue>>) {
    let mut nvme = rig.bring_up(wanted(namespaces, queues)).unwrap();
    let queues = nvme.take_queues();
    (nvme, queues)
}

fn disks(queues: &[Box<dyn Queue>]) -> Vec<usize> {
    queues.iter().map(|queue| queue.disk()).collect()
}

/// Writes a block of `byte`.
fn write(rig: &Rig, queue: &mut dyn Queue, byte: u8) {
    (0..512).for_each(|at| rig.guest.write_u8(at, byte));
    assert_eq!(run(queue, WRITE, &[span(0, 512)], 512), Outcome::Success);
}

/// The first byte of the block.
fn read(rig: &Rig, queue: &mut dyn Queue) -> u8 {
    assert_eq!(run(queue, READ, &[span(4096, 512)], 512), Outcome::Success);
    rig.guest.read_u8(4096)
}

#[test]
fn the_queues_are_divided_and_each_reaches_its_own_namespace() {
    let rig = Rig::new(three());
    let (nvme, mut queues) = up(&rig, &[3, 1], 3);
    assert_eq!(disks(&queues), [0, 0, 1]);

    write(&rig, &mut *queues[0], 0x33);
    write(&rig, &mut *queues[2], 0x11);

    assert_eq!([0, 1, 2].map(|n| read(&rig, &mut *queues[n])), [0x33, 0x33, 0x11]);
    let serials: Vec<_> = nvme.geometries().iter().map(|geometry| geometry.serial.as_str()).collect();
    assert_eq!(serials, ["EMULATED-0_3", "EMULATED-0_1"], "in the order wanted");
    assert!(nvme.disk_state().is_none(), "several disks are not handed over");
}

#[test]
fn after_a_reset_each_queue_has_its_former_namespace() {
    let rig = Rig::new(three());
    let (mut nvme, mut queues) = up(&rig, &[3, 1], 3);
    write(&rig, &mut *queues[0], 0x33);
    write(&rig, &mut *queues[2], 0x11);
    let before = disks(&queues);
    drop(queues);

    let mut queues = nvme.recover().unwrap();

    assert_eq!(disks(&queues), before);
    assert_eq!([0, 1, 2].map(|n| read(&rig, &mut *queues[n])), [0x33, 0x33, 0x11]);
}

#[test]
fn fewer_queues_than_namespaces_are_refused_and_polling_needs_no_vectors() {
    let one = Rig::new(Options { vectors: Some(1), ..three() });
    for refused in [
        one.bring_up(wanted(&[1, 2], 2)),
        Rig::new(three()).bring_up(NvmeOptions { avoid: vec![Avoid::Tags], ..wanted(&[1, 2], 2) }),
        Rig::new(Options { queues: 1, ..three() }).bring_up(wanted(&[1, 2], 2)),
    ] {
        let error = refused.err().unwrap();
        assert!(matches!(error.kind, NvmeErrorKind::TooFewQueues { queues: 1, namespaces: 2 }), "{error}");
    }
    one.assert_stopped();

    let polled = NvmeOptions { interrupts: InterruptPolicy::Poll, ..wanted(&[1, 2], 2) };
    let mut nvme = one.bring_up(polled).unwrap();

    assert_eq!(disks(&nvme.take_queues()), [0, 1]);
}

#[test]
fn a_namespace_that_is_missing_or_another_after_a_reset_keeps_the_drive_down() {
    let rig = Rig::new(three());
    assert!(matches!(
        rig.bring_up(wanted(&[1, 7], 2)).err().unwrap().kind,
        NvmeErrorKind::NamespaceNotFound { wanted: 7, .. }
    ));
    let (mut nvme, queues) = up(&rig, &[1, 2], 2);
    drop(queues);
    rig.machine.inject(Fault::Identify { cns: 0, offset: 120, bytes: vec![2, 0, 0, 0xff, 0xfe, 0, 0, 1] });

    let error = nvme.recover().err().unwrap().to_string();

    assert!(error.contains("namespace 2 is another one"), "{error}");
    rig.assert_stopped();
    rig.machine.clear_faults();
    assert_eq!(nvme.recover().unwrap().len(), 2);
}

#[test]
fn a_new_size_of_any_namespace_is_noticed_and_changes_no_other() {
    let rig = Rig::new(three());
    let (mut nvme, _queues) = up(&rig, &[1, 2], 2);
    let blocks = |nvme: &Nvme| nvme.geometries().iter().map(|geometry| geometry.blocks).collect::<Vec<_>>();
    assert_eq!(blocks(&nvme), [16 << 10; 2]);

    for (namespace, bytes, expected) in [(2, 1 << 20, [16 << 10, 2 << 10]), (1, 2 << 20, [4 << 10, 2 << 10])] {
        rig.machine.resize_namespace(namespace, bytes).unwrap();
        let poller = Poller::new().unwrap();
        poller.add(nvme.event_fd().unwrap().as_fd(), 0).unwrap();
        let mut poller = poller;
        assert_eq!(poller.wait(Some(std::time::Duration::from_secs(10)), |_| ()).unwrap(), 1);
        nvme.handle_events().unwrap();
        assert_eq!(blocks(&nvme), expected);
    }
}
