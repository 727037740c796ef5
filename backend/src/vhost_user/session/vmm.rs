//! The front-end's process and this device: KVM is told there, and guest memory kept from being discarded; where it is not
//! kept, it is watched.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::Session;

impl Session<'_> {
    /// Looks for the shim in the front-end's process, until that is settled.
    pub(in super::super) fn register_with_shim(&mut self) {
        self.link.register();
    }

    /// The shim's descriptor, told once; readable, it wants [`Self::on_shim_event`].
    pub(in super::super) fn new_shim_socket(&mut self) -> Option<BorrowedFd<'_>> {
        self.link.take_new_socket()
    }

    /// The shim has gone, most likely; `front_end_goes` if the front-end is going, too.
    pub(in super::super) fn on_shim_event(&mut self, front_end_goes: bool) {
        self.link.on_shim_event(front_end_goes);
        self.monitor_discards();
    }

    /// The host has got the device back, and waits for the file of it that KVM may hold.
    pub(in super::super) fn on_device_released(&mut self) {
        self.link.unregister();
        self.monitor_discards();
    }

    /// Begins, goes on or ceases to watch, as memory and the shim have it now.
    pub(super) fn monitor_discards(&mut self) {
        let reached = self.device.space.pins() && !self.device.vmm.is_released();
        if reached && !self.link.blocks_discards() {
            self.watch.follow(self.memory.table());
        } else {
            self.watch.pause();
        }
    }

    /// When to call [`Self::look`]; `None` while nothing is watched.
    pub(in super::super) fn next_discard_check(&self) -> Option<Instant> {
        self.watch.next()
    }

    /// Looks whether guest memory has been discarded, if it is time to.
    pub(in super::super) fn look(&mut self) {
        for _ in 0..self.watch.look(Instant::now(), !self.device.space.is_released()) {
            self.device.vmm.alarmed();
        }
    }
}
