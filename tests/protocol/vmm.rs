//! The front-end's process as far as the device's shim is concerned: a real one, an imitation, or none.

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

use crate::rig::Around;

/// The socket of a VM's shim, whether there is one or not.
pub(crate) struct Socket {
    _directory: TempDir,
    pub(crate) path: PathBuf,
}

impl Socket {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("kvm");
        Self { _directory: directory, path }
    }

    /// A device of this name, on which `facts` are known; its file is one that no KVM would take.
    fn vmm(&self, name: &str, facts: Facts) -> Vmm {
        let file = Some("/dev/null".into());
        Vmm::with_shim(Shim { socket: self.path.clone(), device: name.into(), facts, file })
    }

    pub(crate) fn around(&self, name: &str, facts: Facts) -> Around {
        Around { vmm: self.vmm(name, facts), ..Around::default() }
    }

    /// A real shim, as a VMM has it; it stays until the test program ends.
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

    /// Something that is not quite a shim, for so many connections. What came is noted; each connection begins a list of its
    /// own.
    pub(crate) fn pretend(&self, connections: usize, answer: Answer) -> Heard {
        let (listener, heard) = (self.listen(), Heard::default());
        let notes = Arc::clone(&heard);
        thread::spawn(move || {
            let mut listener = Some(listener);
            for left in (0..connections).rev() {
                let socket = accept(listener.as_ref().unwrap()).unwrap();
                // Before the last connection ends, so that whoever comes back finds nobody.
                listener = listener.filter(|_| left > 0);
                notes.lock().unwrap().push(Vec::new());
                let mut bytes = [0; 64];
                while let Ok((length @ 1.., _)) = recv(&socket, &mut bytes, RecvFlags::empty()) {
                    let Request { serial, kind } = Request::from_bytes(&bytes[..length]).unwrap();
                    notes.lock().unwrap().last_mut().unwrap().push(kind);
                    let (reply, goes_on) = answer(kind, Reply { serial, outcome: Ok(7), status: Status::default() });
                    send(&socket, &reply, SendFlags::NOSIGNAL).unwrap();
                    if !goes_on {
                        break;
                    }
                }
            }
        });
        heard
    }
}

/// Makes out of a request and the right reply what is sent, and says whether the connection goes on.
pub(crate) type Answer = fn(Kind, Reply) -> (Vec<u8>, bool);
pub(crate) type Heard = Arc<Mutex<Vec<Vec<Kind>>>>;
