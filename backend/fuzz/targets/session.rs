//! A front-end that says anything: the input is what goes over the socket, in pieces, some with descriptors. The server
//! answers or hangs up, and serves the next one.
#![no_main]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions};
use vhost_device_vfio::emulated::{Machine, Medium, Options};
use vhost_device_vfio::engine::{self, Engine};
use vhost_device_vfio::kvm::Vmm;
use vhost_device_vfio::vhost_user::{Device, Listen, Server};

/// Longest silence of a server that is not stuck; a ring may wait for commands that do not come.
const LIMIT: Duration = Duration::from_secs(20);

struct World {
    /// Things to send: memory files and eventfds.
    fds: Vec<OwnedFd>,
}

fn device() -> Device {
    let options = Options { size: 1 << 20, medium: Medium::Null, ..Options::default() };
    let machine = Machine::new(options).unwrap();
    let space = machine.space();
    let options = NvmeOptions { namespace: None, queues: 2, read_only: false };
    let nvme = Nvme::bring_up(machine.function(), Arc::clone(&space), options).unwrap();
    let options = engine::Options {
        rings: 2,
        spin: Duration::ZERO,
        patience: Duration::from_secs(5),
        watch: engine::Watch::default(),
    };
    let engine = Engine::start(Box::new(nvme), &space, options).unwrap();
    Device { engine, space, queues: 2, vmm: Vmm::unreachable() }
}

fn world() -> World {
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let memory = |bytes| {
        let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, bytes).unwrap();
        OwnedFd::from(file)
    };
    World { fds: vec![memory(1 << 16), memory(1 << 12), event(), event()] }
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

fuzz_target!(|input: &[u8]| {
    static WORLD: OnceLock<World> = OnceLock::new();
    let world = WORLD.get_or_init(world);
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let server = std::thread::spawn(move || {
        let mut server = Server::new(Listen::Fd(theirs.into()).open().unwrap(), device()).unwrap();
        server.run(stop).unwrap();
        server.into_device().engine.shut_down();
    });
    // Each piece: which descriptors, length, bytes.
    let mut rest = input;
    while let [which, len, more @ ..] = rest {
        let (bytes, after) = more.split_at(more.len().min(usize::from(*len)));
        let chosen = (0..8).filter(|bit| which >> bit & 1 == 1);
        let fds: Vec<_> = chosen.map(|bit| world.fds[bit % world.fds.len()].as_fd()).collect();
        if bytes.is_empty() || !send(&ours, bytes, &fds) {
            break;
        }
        rest = after;
    }
    ours.shutdown(Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    if let Err(error) = (&ours).read_to_end(&mut answers) {
        let reset = error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(reset, "the server neither answers nor hangs up: {error}");
    }
    server.join().unwrap();
});
