//! A minimal NVMe driver of a guest: it enables the controller by register writes, submits an Identify command in shared
//! memory, and receives the interrupt through an eventfd.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::client::{CONFIG, Client};
use crate::rig::{Rig, event, memory, wait_for};

/// IOVA and size of the guest's memory.
pub(crate) const BASE: u64 = 0x10_0000;
pub(crate) const BYTES: u64 = 0x1_0000;
/// Offsets of the admin submission queue, the admin completion queue and a data page in that memory.
const SQ: u64 = 0;
const CQ: u64 = 0x1000;
const DATA: u64 = 0x2000;
const COMMAND: u64 = 0x04;
const MEMORY_SPACE_AND_BUS_MASTER: [u8; 2] = [0b110, 0];
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`, and MSI-X.
const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
const MSIX: u32 = 2;

/// Enables the controller, with admin queues of 16 entries.
pub(crate) fn enable(client: &mut Client) {
    client.write(CONFIG, COMMAND, &MEMORY_SPACE_AND_BUS_MASTER).unwrap();
    client.write(0, 0x24, &(15_u32 << 16 | 15).to_le_bytes()).unwrap();
    client.write(0, 0x28, &(BASE + SQ).to_le_bytes()).unwrap();
    client.write(0, 0x30, &(BASE + CQ).to_le_bytes()).unwrap();
    client.write(0, 0x14, &(1_u32 | 6 << 16 | 4 << 20).to_le_bytes()).unwrap();
    (0..1000).find(|_| client.read(0, 0x1c, 4).unwrap()[0] & 1 == 1).expect("CSTS.RDY");
}

/// Submits Identify Controller as entry `slot`, with its data buffer at `data`.
pub(crate) fn identify(client: &mut Client, guest: &File, slot: u32, data: u64) {
    let mut entry = [0; 64];
    entry[0] = 0x06;
    entry[2..4].copy_from_slice(&0x77_u16.to_le_bytes());
    entry[24..32].copy_from_slice(&data.to_le_bytes());
    entry[40] = 1;
    guest.write_all_at(&entry, SQ + u64::from(slot) * 64).unwrap();
    client.write(0, 0x1000, &(slot + 1).to_le_bytes()).unwrap();
}

/// Command identifier and status of completion entry `slot`, once it has been written.
pub(crate) fn completion(guest: &File, slot: u32) -> Option<(u16, u16)> {
    let mut entry = [0; 16];
    guest.read_exact_at(&mut entry, CQ + u64::from(slot) * 16).unwrap();
    let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    (half(14) & 1 == 1).then(|| (half(12), half(14) >> 1))
}

/// Guest memory, mapped for the device.
pub(crate) fn guest(client: &mut Client) -> Arc<File> {
    let guest = memory(BYTES);
    client.dma_map((BASE, BYTES), (Some(guest.as_fd()), 0), 3).unwrap();
    guest
}

#[test]
fn a_guests_driver_receives_its_data_and_the_interrupt() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let vector = event();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.as_fd()]).unwrap();
    enable(&mut client);

    identify(&mut client, &guest, 0, BASE + DATA);

    assert!(wait_for(&vector, 10_000), "no interrupt");
    assert_eq!(completion(&guest, 0), Some((0x77, 0)));
    let mut model = [0; 40];
    guest.read_exact_at(&mut model, DATA + 24).unwrap();
    assert!(model.starts_with(b"vhost-device-vfio"), "{:?}", String::from_utf8_lossy(&model));
}

#[test]
fn dma_to_unmapped_memory_faults_and_the_controller_continues() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    let vector = event();
    client.set_irqs(EVENTFD_TRIGGER, [MSIX, 0, 1], &[vector.as_fd()]).unwrap();
    enable(&mut client);

    identify(&mut client, &guest, 0, BASE + BYTES);

    assert!(wait_for(&vector, 10_000));
    let (_, status) = completion(&guest, 0).unwrap();
    assert_eq!(status & 0x7ff, 0x04, "Data Transfer Error (NVMe 2.0, Figure 94)");
    assert_eq!(rig.machine.iommu().fault_count(), 1);
    identify(&mut client, &guest, 1, BASE + DATA);
    assert!(wait_for(&vector, 10_000), "the controller continues");
    assert_eq!(completion(&guest, 1), Some((0x77, 0)));
}

#[test]
fn without_bus_master_no_command_is_executed() {
    let rig = Rig::new();
    let mut client = rig.client();
    let guest = guest(&mut client);
    enable(&mut client);
    client.write(CONFIG, COMMAND, &[0b010, 0]).unwrap();

    identify(&mut client, &guest, 0, BASE + DATA);

    assert_eq!(completion(&guest, 0), None);
    assert_eq!(client.read(CONFIG, COMMAND, 2).unwrap(), [0b010, 0]);
}
