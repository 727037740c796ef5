//! The front-end's eventfds, and which of them the function signals.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use vhost_device_vfio::vfio_user::EndReason;

use crate::client::{CONFIG, Client, REGION_READ, SET_IRQS, access, words};
use crate::nvme::{BASE, completion, enable, guest, identify};
use crate::rig::{Rig, event, memory, wait_for};

const NONE_TRIGGER: u32 = 1 << 0 | 1 << 5;
const BOOL_TRIGGER: u32 = 1 << 1 | 1 << 5;
const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
const MSIX: u32 = 2;
const ERR: u32 = 3;
const REQ: u32 = 4;
/// Vectors of the emulated function: 16 I/O queues and the admin queue.
const VECTORS: u32 = 17;

fn borrowed(events: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    events.iter().map(AsFd::as_fd).collect()
}

/// An eventfd in blocking mode whose counter is full: a write to it waits until somebody reads. When it is dropped, it is read,
/// so that a server that waits there does not keep the test from ending.
struct Full(OwnedFd);

impl Full {
    fn new() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        Self(event)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        rustix::io::read(&self.0, &mut [0; 8]).unwrap();
    }
}

#[test]
fn vectors_can_be_set_in_several_messages_and_replaced() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let events: Vec<_> = (0..VECTORS).map(|_| event()).collect();
    let other = event();

    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 8], &borrowed(&events[..8])).unwrap();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 8, 8], &borrowed(&events[8..16])).unwrap();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 16, 1], &borrowed(&events[16..])).unwrap();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[other.as_fd()]).unwrap();
    enable(&mut client);
    identify(&mut client, &guest, 0, BASE + 0x2000);

    assert!(wait_for(&other, 10_000), "the last one given for vector 0");
    assert!(events.iter().all(|event| !wait_for(event, 0)), "the others are for other vectors, or replaced");
}

#[test]
fn a_removed_vector_and_a_disabled_interrupt_are_not_signalled() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let vector = event();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.as_fd()]).unwrap();
    enable(&mut client);

    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[]).unwrap();
    identify(&mut client, &guest, 0, BASE + 0x2000);
    assert!(!wait_for(&vector, 100));
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.as_fd()]).unwrap();
    identify(&mut client, &guest, 1, BASE + 0x2000);
    assert!(wait_for(&vector, 10_000));
    client.set_irqs(NONE_TRIGGER, [MSIX, 0, 0], &[]).unwrap();
    identify(&mut client, &guest, 2, BASE + 0x2000);

    assert!(!wait_for(&vector, 100));
}

#[test]
fn an_eventfd_for_errors_can_be_set() {
    let rig = Rig::new();
    let mut client = rig.client();
    let errors = event();

    client.set_irqs(EVENTFD_TRIGGER, [ERR, 0, 1], &[errors.as_fd()]).unwrap();

    assert!(!wait_for(&errors, 0));
}

#[test]
fn the_hosts_request_is_forwarded_to_the_vm_and_the_server_ends_when_the_vm_disconnects() {
    let rig = Rig::new();
    let mut client = rig.client();
    let request = event();
    client.set_irqs(EVENTFD_TRIGGER, [REQ, 0, 1], &[request.as_fd()]).unwrap();

    rig.machine.request_removal();
    assert!(wait_for(&request, 10_000), "the request is forwarded");
    assert!(client.read(CONFIG, 0, 4).is_ok(), "and the VM is served until it has unplugged");
    drop(client);

    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn a_request_eventfd_that_is_full_and_blocking_does_not_stop_the_server() {
    let rig = Rig::new();
    let mut client = rig.client();
    let request = Full::new();
    client.set_irqs(EVENTFD_TRIGGER, [REQ, 0, 1], &[request.0.as_fd()]).unwrap();
    // The server has made it non-blocking; the client shares the mode.
    fcntl_setfl(&request.0, OFlags::empty()).unwrap();

    rig.machine.request_removal();
    // The second reply comes after the request has been handled: both were ready when the server looked for the message.
    let replies: Vec<_> = (0..2).map(|_| replies(&mut client)).collect();
    drop(client);

    assert_eq!(replies, [true, true]);
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

/// True if the server replies to a read of configuration space.
fn replies(client: &mut Client) -> bool {
    client.send(REGION_READ, 0, &access(CONFIG, 0, 4), &[]);
    let mut fds = [PollFd::new(&client.socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap() == 1 && client.receive().is_some()
}

#[test]
fn a_full_vector_eventfd_does_not_stop_the_function() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let vector = Full::new();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.0.as_fd()]).unwrap();
    enable(&mut client);

    identify(&mut client, &guest, 0, BASE + 0x2000);
    identify(&mut client, &guest, 1, BASE + 0x2000);

    rig.wait_until(|_| completion(&guest, 1).is_some());
}

#[test]
fn what_is_not_an_eventfd_is_refused_and_the_eventfd_before_it_stays() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let (vector, request) = (event(), event());
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.as_fd()]).unwrap();
    client.set_irqs(EVENTFD_TRIGGER, [REQ, 0, 1], &[request.as_fd()]).unwrap();
    enable(&mut client);
    let (reader, _writer) = rustix::pipe::pipe().unwrap();

    for (index, other) in [(MSIX, reader.as_fd()), (MSIX, memory(4096).as_fd()), (REQ, reader.as_fd())] {
        assert_eq!(client.set_irqs(EVENTFD_TRIGGER, [index, 0, 1], &[other]).unwrap_err(), 22, "{index}: EINVAL");
    }
    identify(&mut client, &guest, 0, BASE + 0x2000);
    rig.machine.request_removal();

    assert!(wait_for(&vector, 10_000) && wait_for(&request, 10_000));
    drop(client);
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn a_front_end_cannot_end_the_service_in_the_hosts_name() {
    let rig = Rig::new();
    let mut client = rig.client();
    let request = event();
    client.set_irqs(EVENTFD_TRIGGER, [REQ, 0, 1], &[request.as_fd()]).unwrap();

    assert_eq!(client.set_irqs(NONE_TRIGGER, [REQ, 0, 1], &[]).unwrap_err(), 22, "EINVAL");
    let bools = [&words(&[21, BOOL_TRIGGER, REQ, 0, 1])[..], &[1]].concat();
    assert_eq!(client.call(SET_IRQS, &bools, &[]).unwrap_err(), 22, "EINVAL");

    assert!(client.read(CONFIG, 0, 4).is_ok() && !wait_for(&request, 0));
}

#[test]
fn a_newcomer_is_sent_away_while_the_host_waits_for_the_function() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.machine.request_removal();
    // See above: the second reply comes after the request has been handled.
    (0..2).for_each(|_| assert!(client.read(CONFIG, 0, 4).is_ok()));

    let mut newcomer = rig.connect();

    assert!(newcomer.receive().is_none());
    assert!(client.read(CONFIG, 0, 4).is_ok(), "before the 10 s are over");
    drop(client);
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn an_unused_function_is_released_at_once() {
    let rig = Rig::new();
    rig.machine.request_removal();
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}

#[test]
fn a_vm_that_does_not_unplug_loses_the_function() {
    let rig = Rig::new();
    let mut client = rig.client();

    rig.machine.request_removal();

    assert!(client.receive().is_none(), "the server disconnects after 10 s");
    assert_eq!(rig.wait_for_exit(), EndReason::HostWantsFunction);
}
