//! Passthrough of a function whose DMA bypasses the CPU caches: memory is flushed before the function can access it and
//! after it no longer can. The emulated function's cache model counts violations.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vhost_device_vfio::coherency::Policy;
use vhost_device_vfio::emulated::Options;

use crate::rig::{Rig, memory};

fn non_coherent_rig() -> Rig {
    let options = Options { size: 1 << 20, no_snoop: true, snoop_enforced: false, ..Options::default() };
    Rig::with(&options, Policy::Allow)
}

#[test]
fn memory_is_flushed_when_it_is_mapped_and_when_it_is_unmapped() {
    let rig = non_coherent_rig();
    let mut client = rig.client();
    let guest = memory(1 << 20);
    guest.write_all_at(&[0xa5; 0x1000], 0).unwrap();

    client.dma_map((0, 1 << 20), (Some(guest.as_fd()), 0), 3).unwrap();
    client.dma_unmap(0, 1 << 20, 0).unwrap();
    client.dma_map((0, 1 << 20), (Some(guest.as_fd()), 0), 3).unwrap();
    drop(client);
    rig.wait_until(|rig| rig.mapped() == 0);

    let found = rig.machine.stale_lines();
    assert_eq!((found.at_map, found.at_unpin), (0, 0), "pages for which caches and DRAM differ");
}
