//! Connection, disconnection, reset, and a second front-end.

use std::os::fd::AsFd;

use crate::client::{CONFIG, DEVICE_RESET};
use crate::nvme::{BASE, enable, guest, identify};
use crate::rig::{Rig, event, memory, wait_for};

const COMMAND: u64 = 0x04;

#[test]
fn everything_is_reset_and_unmapped_when_a_front_end_disconnects() {
    let rig = Rig::new();
    let mut client = rig.client();
    let _guest = guest(&mut client);
    enable(&mut client);

    drop(client);
    rig.wait_until(|rig| rig.mapped() == 0);

    let mut next = rig.client();
    assert_eq!(next.read(CONFIG, COMMAND, 2).unwrap()[0] & 0b100, 0, "bus master is off");
    assert_eq!(next.read(0, 0x1c, 4).unwrap(), [0; 4], "the controller is disabled (CSTS)");
    assert_eq!(next.read(0, 0x28, 8).unwrap(), [0; 8], "and has no admin queue (ASQ)");
}

#[test]
fn a_reset_stops_dma_and_keeps_memory_mapped() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let vector = event();
    enable(&mut client);
    let mapped = rig.mapped();

    client.call(DEVICE_RESET, &[], &[]).unwrap();

    assert_eq!(client.read(CONFIG, COMMAND, 2).unwrap()[0] & 0b100, 0);
    assert_eq!(rig.mapped(), mapped);
    client.set_irqs(1 << 2 | 1 << 5, [2, 0, 1], &[vector.as_fd()]).unwrap();
    guest.set_len(0).unwrap();
    guest.set_len(crate::nvme::BYTES).unwrap();
    enable(&mut client);
    identify(&mut client, &guest, 0, BASE + 0x2000);
    assert!(wait_for(&vector, 10_000), "a driver can start again");
}

#[test]
fn a_second_front_end_is_rejected_and_the_first_continues() {
    let rig = Rig::new();
    let mut client = rig.client();

    let mut second = rig.connect();

    assert!(second.receive().is_none());
    assert!(client.read(CONFIG, 0, 4).is_ok());
}

#[test]
fn many_front_ends_in_turn_leak_nothing() {
    let rig = Rig::new();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let file = memory(1 << 20);
    let one_session = || {
        let mut client = rig.client();
        client.dma_map((0, 1 << 20), (Some(file.as_fd()), 0), 3).unwrap();
        client.set_irqs(1 << 2 | 1 << 5, [2, 0, 1], &[event().as_fd()]).unwrap();
        drop(client);
        rig.wait_until(|rig| rig.mapped() == 0);
    };
    one_session();
    // Other tests in this process open files at the same time.
    let before = descriptors();

    (0..100).for_each(|_| one_session());

    assert!(descriptors() < before + 90, "{} descriptors, {before} before", descriptors());
}

#[test]
fn the_server_stops_at_once_while_a_front_end_is_connected() {
    let rig = Rig::new();
    let mut client = rig.client();
    let _guest = guest(&mut client);

    drop(rig);

    assert!(client.receive().is_none());
}
