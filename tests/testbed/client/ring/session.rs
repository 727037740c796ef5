//! A ring in a session: what the front-end tells the server of it.

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};

use super::{Error, Layout, Ram, Ring};

impl Ring {
    /// Sets the new ring up on the server's side and enables it.
    pub(in crate::client) fn start(&self, frontend: &mut Frontend, index: usize) -> Result<(), Error> {
        self.describe(frontend, index)?;
        // Both wrap counters of a packed ring start at 1. Like DPDK, this sends only the available one.
        frontend.set_vring_base(index, if matches!(self.layout, Layout::Packed(_)) { 0x8000 } else { 0 })?;
        self.run(frontend, index)
    }

    /// Goes on in a copy of its memory.
    pub(in crate::client) fn move_to(&mut self, ram: &Ram) {
        self.ram = ram.clone();
        match &mut self.layout {
            Layout::Split(split) => split.ram = ram.clone(),
            Layout::Packed(packed) => packed.ram = ram.clone(),
        }
    }

    /// Number of descriptors.
    pub(in crate::client) fn size(&self) -> u16 {
        self.size
    }

    /// The base that QEMU sends whenever it starts the ring without an answer to `GET_VRING_BASE`, as after the death of a server:
    /// the used index in memory, or, for a packed ring, both positions as they were when it started first.
    pub(in crate::client) fn base(&self) -> u32 {
        match &self.layout {
            Layout::Split(split) => split.used_index().into(),
            Layout::Packed(_) => 0x8000_8000,
        }
    }

    /// Tells the server the size and the addresses.
    pub(in crate::client) fn describe(&self, frontend: &Frontend, index: usize) -> Result<(), Error> {
        frontend.set_vring_num(index, self.size)?;
        self.address(frontend, index, false)
    }

    /// Tells the server the addresses, and whether it marks the pages of the used ring.
    pub(in crate::client) fn address(&self, frontend: &Frontend, index: usize, logged: bool) -> Result<(), Error> {
        frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: self.size,
                queue_size: self.size,
                // VHOST_VRING_F_LOG
                flags: logged.into(),
                desc_table_addr: self.ram.address(self.offsets.ring.desc),
                used_ring_addr: self.ram.address(self.offsets.ring.device),
                avail_ring_addr: self.ram.address(self.offsets.ring.driver),
                log_addr: Some(Ram::guest(self.offsets.ring.device)),
            },
        )?;
        Ok(())
    }

    /// Passes the eventfds and enables the ring.
    pub(in crate::client) fn run(&self, frontend: &mut Frontend, index: usize) -> Result<(), Error> {
        frontend.set_vring_call(index, &self.call)?;
        frontend.set_vring_err(index, &self.err)?;
        frontend.set_vring_kick(index, &self.kick)?;
        frontend.set_vring_enable(index, true)?;
        Ok(())
    }
}
