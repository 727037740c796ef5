//! Interrupts by what the function has: own vectors, a shared one, a line, none.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::rig::{Rig, nvme_options, small, span};
use crate::driver::nvme::{InterruptPolicy, Nvme, NvmeOptions};
use crate::driver::{Command, Driver, Queue};
use crate::emulated::{Machine, Options};
use crate::eventfd::drain;
use crate::hardware::{Function, InterruptKind};
use crate::sys::Poller;

/// INTMS. NVMe 2.0 §3.1.3.3
const INTMS: usize = 0x0c;

/// True if `event` has been signalled; takes the signal.
fn signalled(event: BorrowedFd<'_>) -> bool {
    let mut poller = Poller::new().unwrap();
    poller.add(event, 0).unwrap();
    let signalled = poller.wait(Some(Duration::ZERO), |_| ()).unwrap() == 1;
    drain(event);
    signalled
}

fn submit(queue: &mut dyn Queue) {
    queue.submit(Command::Read { block: 0, count: 1 }, &[span(0, 512)], 0, 512, 7).unwrap();
    queue.ring();
}

fn reaped(queue: &mut dyn Queue) -> usize {
    let mut count = 0;
    queue.reap(&mut |_| count += 1);
    count
}

/// A controller with exactly these vectors.
fn with(vectors: u16, msi: u16, intx: bool) -> Options {
    Options { vectors: Some(vectors), msi, intx, ..small() }
}

/// The drive's size has changed, and the driver has noticed.
fn size_is_noticed(rig: &Rig, nvme: &mut Nvme) -> bool {
    let event = nvme.event_fd().unwrap();
    let told = signalled(event);
    nvme.handle_events().unwrap();
    told && nvme.geometry().blocks == 8 << 11 && rig.machine.iommu().faults().is_empty()
}

#[test]
fn every_supply_of_vectors_serves_a_queue_per_vector_or_one_for_all() {
    for (options, queues) in [
        (with(5, 0, false), 3),
        (with(3, 0, true), 2),
        (with(2, 8, true), 1),
        (with(1, 8, true), 1),
        (with(0, 8, true), 3),
        (with(0, 2, false), 1),
        (with(0, 1, false), 1),
        (with(0, 0, true), 1),
    ] {
        let supply = format!("MSI-X {:?}, MSI {}, INTx {}", options.vectors, options.msi, options.intx);
        let rig = Rig::new(options);
        let (_nvme, mut up) = rig.up(3);
        assert_eq!(up.len(), queues, "{supply}");
        for queue in &mut up {
            queue.set_interrupt_wanted(true);
            submit(&mut **queue);
            assert!(signalled(queue.event()), "{supply}");
            assert_eq!(reaped(&mut **queue), 1, "{supply}");
            assert!(!queue.is_polled(), "{supply}");
        }
        drop(up);
    }
}

#[test]
fn without_any_interrupt_the_queues_are_polled_and_none_is_asserted() {
    for (options, interrupts) in [
        (with(0, 0, false), InterruptPolicy::Auto),
        (with(5, 4, true), InterruptPolicy::Poll),
        (with(5, 0, true), InterruptPolicy::Only(InterruptKind::Msi)),
    ] {
        let rig = Rig::new(options);
        let mut nvme = rig.bring_up(NvmeOptions { interrupts, ..nvme_options(2) }).unwrap();
        let mut queues = nvme.take_queues();
        assert_eq!(queues.len(), 2);

        queues[1].set_interrupt_wanted(true);
        submit(&mut *queues[1]);

        assert!(queues[1].is_polled() && nvme.is_polled());
        assert_eq!(rig.function.registers(0).unwrap().read32(INTMS), u32::MAX, "INTx is masked in the controller");
        assert_eq!(rig.machine.traffic().interrupts, 0);
        assert_eq!(reaped(&mut *queues[1]), 1);
    }
}

#[test]
fn an_operators_kind_is_used_even_if_there_is_a_better_one() {
    for (kind, count) in [(InterruptKind::MsiX, 2), (InterruptKind::Msi, 2), (InterruptKind::Intx, 1)] {
        let rig = Rig::new(with(5, 4, true));
        let interrupts = InterruptPolicy::Only(kind);
        let mut nvme = rig.bring_up(NvmeOptions { interrupts, ..nvme_options(2) }).unwrap();

        let mut queues = nvme.take_queues();
        submit(&mut *queues[0]);

        assert_eq!(queues.len(), count, "{kind}");
        assert!(signalled(queues[0].event()), "{kind}");
    }
}

#[test]
fn fewer_queues_are_created_if_the_host_has_fewer_free_vectors() {
    for (free, queues) in [(5, 4), (4, 2), (3, 2), (2, 1), (1, 1)] {
        let rig = Rig::with_function(small(), |function| function.free_vectors = free);

        let (_nvme, mut up) = rig.up(4);

        assert_eq!(up.len(), queues, "{free} free vectors");
        submit(&mut **up.last_mut().unwrap());
        assert!(signalled(up.last().unwrap().event()), "{free} free vectors");
    }
}

#[test]
fn an_event_of_the_controller_is_noticed_with_one_vector_for_all() {
    for options in [with(1, 0, false), with(0, 1, false), with(0, 0, true)] {
        let rig = Rig::new(options);
        let (mut nvme, mut queues) = rig.up(1);
        let queue = &mut *queues[0];
        queue.set_interrupt_wanted(true);
        rig.machine.resize(4 << 20).unwrap();
        rig.machine.resize(8 << 20).unwrap();
        assert!(signalled(queue.event()), "the vector wakes the worker up");
        assert!(!signalled(nvme.event_fd().unwrap()), "which has not looked yet");

        queue.set_interrupt_wanted(true);

        assert!(size_is_noticed(&rig, &mut nvme));
        queue.set_interrupt_wanted(true);
        assert!(!signalled(nvme.event_fd().unwrap()), "only a completion of the admin queue wakes its handler up");
    }
}

#[test]
fn a_worker_that_never_waits_still_notices_an_event_of_the_controller() {
    let rig = Rig::new(with(1, 0, false));
    let (mut nvme, mut queues) = rig.up(1);
    queues[0].set_interrupt_wanted(false);
    rig.machine.resize(8 << 20).unwrap();

    queues[0].tick(8);

    assert!(size_is_noticed(&rig, &mut nvme));
}

#[test]
fn a_line_interrupts_once_until_its_worker_waits_again() {
    let rig = Rig::new(with(0, 0, true));
    let (_nvme, mut queues) = rig.up(1);
    let queue = &mut *queues[0];
    submit(queue);
    assert!(signalled(queue.event()));
    submit(queue);
    assert!(!signalled(queue.event()), "masked");
    assert_eq!(reaped(queue), 2);

    queue.set_interrupt_wanted(true);
    assert!(!signalled(queue.event()), "no longer asserted");
    submit(queue);

    assert!(signalled(queue.event()), "unmasked");
    queue.set_interrupt_wanted(true);
    assert!(signalled(queue.event()), "an entry that was not reaped asserts it again");
}

#[test]
fn a_line_that_the_admin_queue_asserts_stays_masked_until_its_handler_is_done() {
    let rig = Rig::new(with(0, 0, true));
    let (mut nvme, mut queues) = rig.up(1);
    let queue = &mut *queues[0];
    rig.machine.resize(4 << 20).unwrap();
    assert!(signalled(queue.event()));

    queue.set_interrupt_wanted(true);
    queue.set_interrupt_wanted(true);
    assert!(!signalled(queue.event()), "no storm of interrupts");
    nvme.handle_events().unwrap();

    submit(queue);
    assert!(signalled(queue.event()), "unmasked by the handler");
}

#[test]
fn interrupts_are_turned_off_when_the_controller_stops_and_on_again_when_it_recovers() {
    for options in [with(5, 0, false), with(0, 4, false), with(0, 0, true)] {
        let rig = Rig::new(options);
        let (mut nvme, queues) = rig.up(2);
        let count = queues.len();
        drop(queues);

        let mut queues = nvme.recover().unwrap();
        submit(&mut *queues[0]);
        assert!(signalled(queues[0].event()));
        assert_eq!(queues.len(), count);
        drop(queues);
        nvme.shut_down();

        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let function = Arc::clone(&rig.function);
        for kind in [InterruptKind::MsiX, InterruptKind::Msi, InterruptKind::Intx] {
            if function.vectors(kind) != 0 {
                function.route_vectors(kind, &[event.as_fd()]).unwrap();
                function.route_vectors(kind, &[]).unwrap();
            }
        }
        assert_eq!(rig.function.faults.resets.load(SeqCst), 0);
        rig.assert_stopped();
    }
}

#[test]
fn an_event_of_a_controller_that_bypasses_the_caches_is_noticed_too() {
    let machine = Machine::new(Options { no_snoop: true, snoop_enforced: false, ..with(1, 0, false) }).unwrap();
    let mut nvme = Nvme::bring_up(machine.function(), machine.staged_space(), nvme_options(1)).unwrap();
    let queues = nvme.take_queues();
    // A look at the ring before the event, so that its line is in the cache.
    queues[0].set_interrupt_wanted(true);
    assert!(!signalled(nvme.event_fd().unwrap()));
    machine.resize(4 << 20).unwrap();

    queues[0].set_interrupt_wanted(true);

    assert!(signalled(nvme.event_fd().unwrap()));
    drop(queues);
}
