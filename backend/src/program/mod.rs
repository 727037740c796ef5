//! The two answers to "what is done with the function", each composed with the answers to "how is it obtained" (`origin.rs`)
//! and "who asks" (the protocol rooms). Only the program knows all of them; no room knows another's alternatives.

pub(crate) mod block;
pub(crate) mod origin;
pub(crate) mod whole;

use std::path::PathBuf;
use std::sync::Arc;

use vhost_device_vfio::coherency::Facts;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::hardware::AddressSpace;
use vhost_device_vfio::kvm::{Shim, Vmm};

/// A function that is ours, and the address space it lives in.
pub(crate) struct Obtained<F: ?Sized> {
    pub(crate) function: Arc<F>,
    pub(crate) space: Arc<dyn AddressSpace>,
    /// What the verdict on its DMA rests on.
    pub(crate) facts: Facts,
    /// The device's own file, by which KVM can be told of it; none if it is emulated.
    pub(crate) file: Option<PathBuf>,
}

impl<F: ?Sized> Obtained<F> {
    /// The virtual machine's process, which is to hear of the device `name` if `--kvm-socket` was given.
    fn vmm(&self, config: &Config, name: &str) -> Vmm {
        let shim = |socket| Shim { socket, device: name.to_owned(), facts: self.facts, file: self.file.clone() };
        config.kvm_socket.clone().map_or_else(Vmm::without_shim, |socket| Vmm::with_shim(shim(socket)))
    }
}
