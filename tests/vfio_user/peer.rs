//! The independent client of the rust-vmm project.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::nvme::{BASE, BYTES};
use crate::rig::{Rig, event, memory, wait_for};

#[test]
fn the_client_of_rust_vmm_enables_the_controller_and_is_interrupted() {
    let rig = Rig::new();
    let mut client = vfio_user::Client::new(&rig.path).unwrap();
    let guest = memory(BYTES);
    let vector: OwnedFd = event();

    client.dma_map(0, BASE, BYTES, guest.as_raw_fd()).unwrap();
    let irqs = client.get_irq_info(2).unwrap();
    client.set_irqs(2, 1 << 2 | 1 << 5, 0, 1, &[vector.as_raw_fd()]).unwrap();
    client.region_write(7, 4, &[0b110, 0]).unwrap();
    client.region_write(0, 0x24, &(15_u32 << 16 | 15).to_le_bytes()).unwrap();
    client.region_write(0, 0x28, &BASE.to_le_bytes()).unwrap();
    client.region_write(0, 0x30, &(BASE + 0x1000).to_le_bytes()).unwrap();
    client.region_write(0, 0x14, &(1_u32 | 6 << 16 | 4 << 20).to_le_bytes()).unwrap();
    let mut entry = [0; 64];
    entry[0] = 0x06;
    entry[24..32].copy_from_slice(&(BASE + 0x2000).to_le_bytes());
    entry[40] = 1;
    guest.write_all_at(&entry, 0).unwrap();
    client.region_write(0, 0x1000, &1_u32.to_le_bytes()).unwrap();

    assert!(wait_for(&vector, 10_000));
    let mut serial = [0; 4];
    guest.read_exact_at(&mut serial, 0x2000 + 24).unwrap();
    assert_eq!(&serial, b"vhos", "its model");
    assert_eq!((irqs.index, irqs.count), (2, 17));
    assert_eq!(client.region(7).unwrap().size, 4096);
    client.dma_unmap(BASE, BYTES).unwrap();
    assert_eq!(rig.mapped(), 0);
    client.reset().unwrap();
    client.shutdown().unwrap();
}
