//! The limits of the server's process: as many maps as the version promises can be made, and one that cannot be made is
//! answered with an errno.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testbed::own_process::in_own_process;
use vhost_device_vfio::addr::{Gpa, Qva, Span};
use vhost_device_vfio::memory::{Region, RegionSpec};

use crate::client::{CONFIG, Client};
use crate::rig::{Rig, memory};

const READ_WRITE: u32 = 3;
const EMFILE: u32 = 24;
const ENOSPC: u32 = 28;

fn limit_open_files(soft: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum }).unwrap();
}

#[test]
fn as_many_maps_as_the_version_promises_can_be_made_of_one_file() {
    if !in_own_process("limits::as_many_maps_as_the_version_promises_can_be_made_of_one_file") {
        return;
    }
    limit_open_files(256);
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(1 << 20);

    for n in 0..4096 {
        client.dma_map((n << 16, 0x1000), (Some(file.as_fd()), 0), READ_WRITE).unwrap();
    }

    assert_eq!(rig.mapped(), 4096 * 0x1000);
    assert_eq!(client.dma_map((4096 << 16, 0x1000), (Some(file.as_fd()), 0), READ_WRITE).unwrap_err(), ENOSPC);
}

#[test]
fn a_map_without_room_for_its_descriptor_is_refused_and_the_connection_continues() {
    if !in_own_process("limits::a_map_without_room_for_its_descriptor_is_refused_and_the_connection_continues") {
        return;
    }
    let rig = Rig::new();
    let mut client = rig.client();
    limit_open_files(64);
    // Each takes one descriptor of this process, which is both front-end and server, and needs two while it is made.
    let mut map = |n: u64| client.dma_map((n << 20, 0x1000), (Some(memory(0x1000).as_fd()), 0), READ_WRITE);

    let refused = (0..64).find_map(|n| map(n).err());

    assert_eq!(refused, Some(EMFILE));
    client.dma_unmap(0, 0x1000, 0).unwrap();
    client.dma_map((0, 0x1000), (Some(memory(0x1000).as_fd()), 0), READ_WRITE).unwrap();
}

#[test]
fn a_map_that_cannot_be_watched_for_sigbus_is_refused() {
    if !in_own_process("limits::a_map_that_cannot_be_watched_for_sigbus_is_refused") {
        return;
    }
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(0x1000);
    let region = || {
        let (gpa, qva) = (Span::new(Gpa(0), 0x1000).unwrap(), Qva(0));
        Region::map(RegionSpec { gpa, qva, offset: 0, file: Arc::clone(&file) })
    };
    let regions: Vec<_> = std::iter::from_fn(|| region().ok()).collect();
    assert!(regions.len() > 4096 + 509, "{}", regions.len());

    let refused = client.dma_map((0, 0x1000), (Some(file.as_fd()), 0), READ_WRITE);

    assert_eq!(refused.unwrap_err(), ENOSPC);
    assert_eq!(rig.mapped(), 0);
    drop(regions);
    client.dma_map((0, 0x1000), (Some(file.as_fd()), 0), READ_WRITE).unwrap();
}

#[test]
fn memory_of_the_last_map_can_be_truncated_like_that_of_the_first() {
    if !in_own_process("limits::memory_of_the_last_map_can_be_truncated_like_that_of_the_first") {
        return;
    }
    let rig = Rig::new();
    let mut client = rig.client();
    let file = memory(0x1000);
    for n in 0..4095 {
        client.dma_map((0x1000_0000 + (n << 12), 0x1000), (Some(file.as_fd()), 0), READ_WRITE).unwrap();
    }
    let guest = crate::nvme::guest(&mut client);
    crate::nvme::enable(&mut client);

    guest.set_len(0).unwrap();
    // The function reads its queue in memory that is gone.
    client.write(0, 0x1000, &1_u32.to_le_bytes()).unwrap();

    assert_serves(&mut client);
}

fn assert_serves(client: &mut Client) {
    assert!(client.read(CONFIG, 0, 4).is_ok());
}
