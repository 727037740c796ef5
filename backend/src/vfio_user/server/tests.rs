//! A front-end that is silent, and one whose session is dropped instead of closed. Tests over the socket are in
//! `tests/vfio_user`.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_vfio_shim::wire::{Reply, Request, Status};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, listen, recv, send, socket,
};
use vmm_sys_util::tempdir::TempDir;
use zerocopy::IntoBytes;

use super::super::connection::Message;
use super::super::wire::{self, Command, HEADER, Header, TYPE_COMMAND};
use super::*;
use crate::coherency::{Facts, Personality, Policy};
use crate::emulated::{Machine, Options};
use crate::hardware::{AddressSpace, DmaBuffer, MapError, SpaceStatistics};
use crate::kvm::Shim;
use crate::memory::Region;
use crate::passthrough::BarAccess;

fn facts(machine: &Machine) -> Facts {
    Facts { personality: Personality::WholeFunction, ..machine.facts(Policy::Suppress).unwrap() }
}

fn passthrough(machine: &Machine, space: Arc<dyn AddressSpace>) -> Passthrough {
    Passthrough::new(machine.whole_function(), space, BarAccess::Direct, facts(machine), false).unwrap()
}

fn machine() -> Machine {
    Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap()
}

fn call(session: &mut Session<'_>, command: Command, payload: &[u8], fds: Vec<OwnedFd>) {
    let size = u32::try_from(HEADER + payload.len()).unwrap();
    let header = Header { id: 1, command: command as u16, size, flags: TYPE_COMMAND, error: 0 };
    let (_, outcome) = session.handle(Message { header, payload: payload.to_vec(), fds, unusable: None });
    assert!(outcome.is_ok(), "{outcome:?}");
}

#[test]
fn a_front_end_that_negotiates_no_version_loses_its_place() {
    let machine = machine();
    let (device, vmm) = (passthrough(&machine, machine.space()), Vmm::without_shim());
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let (peer, stop) = (Peer::of(&ours).unwrap(), eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let refusals = SharedLog::new(module_path!());
    let session = Session::new(&device, &vmm, &refusals, peer, stop.as_fd());
    let by = Instant::now() + VERSION_TIMEOUT;
    let mut current = Current { connection: Connection::new(ours).unwrap(), session, version_by: Some(by) };

    let silent = (current.deadline(), current.check_deadline(by));
    call(&mut current.session, Command::Version, &[0, 0, 1, 0], Vec::new());
    let negotiated = (current.deadline(), current.check_deadline(by));

    assert!(matches!(silent, (Some(at), Err(Error::Silent(_))) if at == by));
    assert!(matches!(negotiated, (None, Ok(()))), "afterwards it may be silent");
}

/// A shim that agrees to the first two requests, HELLO and REGISTER. Returns its end of the connection.
fn shim(path: &Path) -> JoinHandle<OwnedFd> {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    std::thread::spawn(move || {
        let connection = accept(&listener).unwrap();
        for _ in 0..2 {
            let mut bytes = [0; 4096];
            let (length, _) = recv(&connection, &mut bytes, RecvFlags::empty()).unwrap();
            let request = Request::from_bytes(&bytes[..length]).unwrap();
            let reply = Reply { serial: request.serial, outcome: Ok(7), status: Status::default() };
            send(&connection, &reply.to_bytes(), SendFlags::NOSIGNAL).unwrap();
        }
        connection
    })
}

/// An address space that records whether the shim is still connected when memory is unmapped.
struct Observed {
    inner: Arc<dyn AddressSpace>,
    shim: Mutex<Option<OwnedFd>>,
    connected: Mutex<Vec<bool>>,
}

impl AddressSpace for Observed {
    fn add(&self, region: &Arc<Region>) -> Result<(), MapError> {
        self.inner.add(region)
    }
    fn remove(&self, region: &Region) -> Result<(), MapError> {
        let shim = self.shim.lock().unwrap();
        let received = recv(shim.as_ref().unwrap(), &mut [0; 1], RecvFlags::DONTWAIT);
        self.connected.lock().unwrap().push(received == Err(rustix::io::Errno::AGAIN));
        self.inner.remove(region)
    }
    fn statistics(&self) -> SpaceStatistics {
        self.inner.statistics()
    }
    fn buffer(&self, bytes: usize) -> Result<DmaBuffer, MapError> {
        self.inner.buffer(bytes)
    }
}

#[test]
fn a_session_that_is_dropped_unmaps_memory_before_it_unregisters_the_function() {
    let (machine, directory) = (machine(), TempDir::new().unwrap());
    let socket = directory.as_path().join("kvm");
    let shim = shim(&socket);
    let observed = Observed { inner: machine.space(), shim: Mutex::default(), connected: Mutex::default() };
    let space = Arc::new(observed);
    let device = passthrough(&machine, Arc::clone(&space) as _);
    let vmm = Vmm::with_shim(Shim { socket, device: "emulated".into(), facts: facts(&machine), file: None });
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let refusals = SharedLog::new(module_path!());
    let mut session = Session::new(&device, &vmm, &refusals, Peer::of(&ours).unwrap(), stop.as_fd());
    call(&mut session, Command::Version, &[0, 0, 1, 0], Vec::new());
    *space.shim.lock().unwrap() = Some(shim.join().unwrap());
    let guest = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&guest, 0x1000).unwrap();
    let flags = wire::MAP_READ | wire::MAP_WRITE;
    let map = wire::DmaMap { argsz: 32, flags, offset: 0, address: 0x1000, size: 0x1000 };
    call(&mut session, Command::DmaMap, map.as_bytes(), vec![guest]);

    drop(session);

    assert_eq!(*space.connected.lock().unwrap(), [true]);
    assert!(machine.iommu().mapped().is_empty());
}
