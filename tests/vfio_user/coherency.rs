//! Passthrough of a function whose DMA bypasses the CPU caches: memory is flushed before the function can access it and
//! after it no longer can. The emulated function's cache model counts violations.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use kvm_vfio_shim::wire::{Reply, Request, Status};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketType, accept, bind, listen, recv, send,
    shutdown, socket,
};
use vhost_device_vfio::coherency::Policy;
use vhost_device_vfio::emulated::Options;
use vmm_sys_util::tempdir::TempDir;

use crate::rig::{Rig, memory};

fn non_coherent() -> Options {
    Options { size: 1 << 20, no_snoop: true, snoop_enforced: false, ..Options::default() }
}

fn non_coherent_rig() -> Rig {
    Rig::with(&non_coherent(), Policy::Allow)
}

/// A shim that serves one connection, agrees to every request, and does not listen any more. Returns the connection.
fn shim(path: &Path) -> Receiver<OwnedFd> {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    let (accepted, connections) = sync_channel(1);
    std::thread::spawn(move || {
        let connection = accept(&listener).unwrap();
        drop(listener);
        accepted.send(connection.try_clone().unwrap()).unwrap();
        let mut bytes = [0; 4096];
        while let Ok((length @ 1.., _)) = recv(&connection, &mut bytes, RecvFlags::empty()) {
            let request = Request::from_bytes(&bytes[..length]).unwrap();
            let reply = Reply { serial: request.serial, outcome: Ok(7), status: Status::default() };
            send(&connection, &reply.to_bytes(), SendFlags::NOSIGNAL).unwrap();
        }
    });
    connections
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

#[test]
fn a_function_that_kvm_no_longer_knows_is_taken_from_the_guest() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("kvm");
    let connections = shim(&path);
    let rig = Rig::registered(&non_coherent(), &path);
    let mut client = rig.client();
    let guest = memory(1 << 20);
    client.dma_map((0, 1 << 20), (Some(guest.as_fd()), 0), 3).unwrap();

    shutdown(connections.recv().unwrap(), Shutdown::Both).unwrap();

    assert!(client.receive().is_none(), "the server hangs up");
    rig.wait_until(|rig| rig.mapped() == 0);
    let refused = rig.connect().version().map(|_| ()).unwrap_err();
    assert_eq!(refused, 1, "EPERM for the next front-end, as without a shim");
}
