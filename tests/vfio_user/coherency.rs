//! A function that goes behind the CPU caches, passed through: memory is flushed before the function can reach it and after
//! it no longer can. The emulated function's model of the caches counts where that was not so.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vhost_device_vfio::coherency::Policy;
use vhost_device_vfio::emulated::Options;

use crate::rig::{Rig, memory};

fn behind_the_caches() -> Rig {
    let options = Options { size: 1 << 20, no_snoop: true, snoop_enforced: false, ..Options::default() };
    Rig::with(&options, Policy::Allow)
}

#[test]
fn memory_is_flushed_when_it_comes_and_when_it_goes() {
    let rig = behind_the_caches();
    let mut client = rig.client();
    let guest = memory(1 << 20);
    guest.write_all_at(&[0xa5; 0x1000], 0).unwrap();

    client.dma_map((0, 1 << 20), (Some(guest.as_fd()), 0), 3).unwrap();
    client.dma_unmap(0, 1 << 20, 0).unwrap();
    client.dma_map((0, 1 << 20), (Some(guest.as_fd()), 0), 3).unwrap();
    drop(client);
    rig.until(|rig| rig.mapped() == 0);

    let found = rig.machine.stale_lines();
    assert_eq!((found.at_map, found.at_unpin), (0, 0), "pages that caches and DRAM did not agree about");
}
