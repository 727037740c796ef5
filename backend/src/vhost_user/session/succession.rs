//! The session of a front-end that waits while another one is served, and how it takes that one's place.
//!
//! ```text
//!             waits                                  is served                          has given way
//!  messages   answered; memory mapped in the second  rings run                          its connection ends
//!             space; no ring runs; the engine is
//!             not told of anything
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::Session;
use crate::hardware::{AddressSpace, SecondSpace};
use crate::kvm::ShimLink;
use crate::socket::Peer;
use crate::vhost_user::features::VirtioFeatures;
use crate::vhost_user::guest_memory::GuestMemory;
use crate::vhost_user::logs::Logs;
use crate::vhost_user::vring::Vring;
use crate::vhost_user::{Device, Error, config};

impl<'d> Session<'d> {
    /// The session of a front-end that waits. Its memory is mapped in `space`, and the shim of its VM listens at `kvm_socket`.
    pub(in super::super) fn of_next(
        (device, logs): (&'d Device, &'d Logs),
        peer: Peer,
        space: Arc<dyn AddressSpace>,
        kvm_socket: Option<PathBuf>,
    ) -> Self {
        let memory = GuestMemory::of_next(space, device, &logs.memory);
        let shim = ShimLink::of_next(&device.vmm, peer.pid(), kvm_socket);
        Self { memory, shim, is_served: false, ..Self::new(device, logs, peer) }
    }

    /// Fails while another front-end is served, whose guest the message would affect.
    pub(super) fn require_served(&self, request: &'static str) -> Result<(), Error> {
        if self.is_served { Ok(()) } else { Err(Error::NotServedYet { request }) }
    }

    /// True if no vring runs, and none would if it could.
    pub(in super::super) fn has_stopped(&self) -> bool {
        !self.rings.iter().any(Vring::is_set_up)
    }

    /// True if a vring would run if this front-end were served.
    pub(in super::super) fn is_ready(&self) -> bool {
        let starts = |features| self.rings.iter().any(|ring| ring.could_start(features, self.memory.table()));
        self.features.is_some_and(starts)
    }

    /// When the last vring that ran has stopped.
    pub(in super::super) fn stopped_at(&self) -> Option<Instant> {
        self.stopped_at
    }

    /// Takes the place of `former`, none of whose vrings runs, or of a front-end that has left: moves the function to the memory of
    /// this session in one step, and only then starts the vrings that are ready.
    ///
    /// # Errors
    /// Nothing has changed.
    pub(in super::super) fn succeed(
        &mut self,
        former: Option<&mut Self>,
        second: &dyn SecondSpace,
    ) -> Result<(), Error> {
        let Device { engine, .. } = self.device;
        let exchange = || Ok(engine.while_idle(|| second.exchange())??);
        let keeps_write_cache = former.as_ref().is_some_and(|former| former.features.is_some());
        match former {
            Some(former) => {
                former.memory.give_way(&mut self.memory, exchange)?;
                former.is_served = false;
            }
            None => GuestMemory::new(self.device, &self.logs.memory).give_way(&mut self.memory, exchange)?,
        }
        self.is_served = true;
        self.shim.succeed();
        // The guest is the same, and goes on with the setting that it has made, unless it cannot flush.
        if let Some(features) = self.features
            && !(keeps_write_cache && features.contains(VirtioFeatures::FLUSH))
        {
            config::apply_features(engine, features);
        }
        self.apply_log();
        self.start_rings();
        self.monitor_discards();
        Ok(())
    }
}
