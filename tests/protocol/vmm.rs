//! The KVM shim of a front-end's process: a real one, an imitation, or none.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use kvm_vfio_shim::wire::{Kind, Reply, Request};
use kvm_vfio_shim::{Config, Policy, Server, Status, Vm};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, listen, recv, send,
    socket_with,
};
use vhost_device_vfio::coherency::Facts;
use vhost_device_vfio::kvm::{Shim, Vmm};
use vmm_sys_util::tempdir::TempDir;

use crate::rig::Environment;

/// The socket path of a shim. The shim need not exist.
pub(crate) struct ShimSocket {
    _directory: TempDir,
    pub(crate) path: PathBuf,
}

impl ShimSocket {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("kvm");
        Self { _directory: directory, path }
    }

    /// The registration of a device with this name and these facts. KVM would refuse its file.
    fn vmm(&self, name: &str, facts: Facts) -> Vmm {
        let file = Some("/dev/null".into());
        Vmm::with_shim(Shim { socket: self.path.clone(), device: name.into(), facts, file })
    }

    pub(crate) fn environment(&self, name: &str, facts: Facts) -> Environment {
        Environment { vmm: self.vmm(name, facts), ..Environment::default() }
    }

    /// Runs a real shim, until the test program exits.
    pub(crate) fn serve(&self) -> &'static Vm {
        let vm: &'static Vm = Box::leak(Box::default());
        let config = Config { socket: self.path.clone(), policy: Policy::Lock, peer: None, log: |_| () };
        let mut server = Server::new(&config, vm).unwrap();
        thread::spawn(move || server.run());
        vm
    }

    pub(crate) fn listen(&self) -> OwnedFd {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        listen(&socket, 4).unwrap();
        socket
    }

    /// Runs an imitation of a shim for this number of connections. Returns the requests it receives, one list per
    /// connection.
    pub(crate) fn imitate(&self, connections: usize, answer: AnswerFn) -> ReceivedRequests {
        let (listener, received) = (self.listen(), ReceivedRequests::default());
        let requests = Arc::clone(&received);
        thread::spawn(move || {
            let mut listener = Some(listener);
            for left in (0..connections).rev() {
                let socket = accept(listener.as_ref().unwrap()).unwrap();
                // Closed before the last connection ends, so that a client cannot connect again.
                listener = listener.filter(|_| left > 0);
                requests.lock().unwrap().push(Vec::new());
                let mut bytes = [0; 64];
                while let Ok((length @ 1.., _)) = recv(&socket, &mut bytes, RecvFlags::empty()) {
                    let Request { serial, kind } = Request::from_bytes(&bytes[..length]).unwrap();
                    requests.lock().unwrap().last_mut().unwrap().push(kind);
                    let (reply, keep_open) = answer(kind, Reply { serial, outcome: Ok(7), status: Status::default() });
                    send(&socket, &reply, SendFlags::NOSIGNAL).unwrap();
                    if !keep_open {
                        break;
                    }
                }
            }
        });
        received
    }
}

/// From a request and its correct reply, returns the bytes to send and whether the connection stays open.
pub(crate) type AnswerFn = fn(Kind, Reply) -> (Vec<u8>, bool);
pub(crate) type ReceivedRequests = Arc<Mutex<Vec<Vec<Kind>>>>;
