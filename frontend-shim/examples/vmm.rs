//! How a VMM written in Rust embeds the shim. Numbered comments mark the five places that a VMM must change. The rest is a
//! minimal VMM.
//!
//! ```text
//! vmm /run/vm1/kvm.sock          then, elsewhere:   ask /run/vm1/kvm.sock
//! ```
#![expect(unsafe_code, reason = "a VMM talks to KVM by ioctl; a real one has kvm-ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use kvm_vfio_shim::{Config, Policy, Server, Vm, kvm};

/// One per process, shared by the threads of the VMM and of the shim.
static VM: Vm = Vm::new();

fn create_vm() -> io::Result<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: the argument is an integer.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), kvm::KVM_CREATE_VM, 0) };
    if vm < 0 {
        return Err(io::Error::last_os_error());
    }
    // 1. Pass the VM to the shim.
    VM.vm_created(vm);
    // SAFETY: KVM has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

/// 2. Start the server in its own thread. A VMM that handles signals blocks them in this thread.
fn serve(socket: PathBuf) -> io::Result<()> {
    let config = Config { socket, policy: Policy::Lock, peer: None, log: |line| eprintln!("shim: {line}") };
    let mut server = Server::new(&config, &VM)?;
    std::thread::Builder::new().name("kvm-vfio-shim".into()).spawn(move || server.run())?;
    Ok(())
}

/// 3. For its own VFIO devices the VMM uses the shared kvm-vfio device. `KVM_CREATE_DEVICE` succeeds only once per VM.
fn own_vfio_device(vm: &OwnedFd) -> io::Result<OwnedFd> {
    VM.vfio_device(vm.as_raw_fd())
}

fn vcpu() {
    // 4. Before KVM_RUN.
    VM.vcpu_enters();
}

/// 5. Everything that returns guest memory to the host: a balloon, free page reporting, virtio-mem.
fn inflate_balloon(memory: &File, offset: u64, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let punch = || fallocate(memory, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes);
    // `None`: a device can access this memory, so the pages stay.
    VM.unless_pinned(punch).unwrap_or(Ok(()))?;
    Ok(())
}

fn main() -> io::Result<()> {
    let socket = std::env::args().nth(1).unwrap_or_else(|| "/tmp/kvm-vfio-shim.sock".to_owned());
    let vm = create_vm()?;
    serve(socket.into())?;
    let _device = own_vfio_device(&vm)?;
    let memory: File = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    memory.set_len(1 << 20)?;
    vcpu();
    inflate_balloon(&memory, 0, 1 << 20)?;
    println!("running until standard input ends");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}
