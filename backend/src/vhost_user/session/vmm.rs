//! The shim in the front-end's process registers the device with KVM and blocks discards of guest memory. Where it does not
//! block them, guest memory is monitored.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use super::Session;

impl Session<'_> {
    /// Connects to the shim and registers the device, unless that has succeeded or been given up.
    pub(in super::super) fn register_with_shim(&mut self) {
        self.shim.register();
    }

    /// The socket of a newly connected shim, returned once. When it becomes readable, call [`Self::on_shim_event`].
    pub(in super::super) fn new_shim_socket(&mut self) -> Option<BorrowedFd<'_>> {
        self.shim.take_new_socket()
    }

    /// The shim's socket is readable, most likely because the shim has exited. `front_end_exits`: the front-end exits, too.
    pub(in super::super) fn on_shim_event(&mut self, front_end_exits: bool) {
        self.shim.on_shim_event(front_end_exits);
        self.monitor_discards();
    }

    /// The session of another process is this process's now, and with it the registration.
    pub(in super::super) fn confirm_registration(&mut self) {
        self.shim.confirm();
        self.monitor_discards();
    }

    /// The device has been released to the host. The host waits until KVM closes its file of the device.
    pub(in super::super) fn on_device_released(&mut self) {
        self.shim.unregister();
        self.monitor_discards();
    }

    /// Monitors guest memory if the device pins it and the shim does not block discards; otherwise pauses.
    pub(super) fn monitor_discards(&mut self) {
        let pinned = self.device.space.pins() && !self.device.vmm.is_released();
        if pinned && !self.shim.blocks_discards() {
            self.discards.follow(self.memory.table());
        } else {
            self.discards.pause();
        }
    }

    /// When to call [`Self::check_discards`]; `None` while nothing is monitored.
    pub(in super::super) fn next_discard_check(&self) -> Option<Instant> {
        self.discards.next()
    }

    /// Checks whether guest memory has been discarded, if the check is due.
    pub(in super::super) fn check_discards(&mut self) {
        for _ in 0..self.discards.look(Instant::now(), !self.device.space.is_released()) {
            self.device.vmm.alarmed();
        }
    }
}
