//! The services of the program: a disk (`block.rs`), several of one drive (`several.rs`) and a whole function (`whole.rs`). Each
//! combines a source of the function (`origin.rs`) with a protocol. Only the program knows all combinations; the modules of the
//! library are independent.

pub(crate) mod block;
pub(crate) mod confined;
pub(crate) mod limits;
pub(crate) mod logging;
pub(crate) mod movable;
pub(crate) mod operator;
pub(crate) mod origin;
pub(crate) mod placement;
pub(crate) mod several;
pub(crate) mod takeover;
pub(crate) mod vfio_source;
pub(crate) mod whole;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_device_vfio::coherency::Facts;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::hardware::AddressSpace;
use vhost_device_vfio::kvm::{SecondFile, Shim, Vmm};

/// The signals that this process handles, as descriptors.
pub(crate) struct Signals {
    /// SIGTERM and SIGINT.
    pub(crate) stop: OwnedFd,
    /// SIGUSR2: start the installed program, and hand over to it.
    pub(crate) upgrade: OwnedFd,
}

/// A function that this process owns, with its address space.
pub(crate) struct OwnedFunction<F: ?Sized> {
    pub(crate) function: Arc<F>,
    pub(crate) space: Arc<dyn AddressSpace>,
    /// The facts that decide the verdict on its DMA.
    pub(crate) facts: Facts,
    /// The VFIO device file, by which KVM can be told of it; `None` if it is emulated.
    pub(crate) file: Option<SecondFile>,
}

impl<F: ?Sized> OwnedFunction<F> {
    /// The virtual machine's process. The device `name` is registered with it if `--kvm-socket` was given.
    fn vmm(&self, config: &Config, name: &str) -> Vmm {
        let shim = |socket| Shim { socket, device: name.to_owned(), facts: self.facts, file: self.file.clone() };
        config.kvm_socket.clone().map_or_else(Vmm::without_shim, |socket| Vmm::with_shim(shim(socket)))
    }
}
