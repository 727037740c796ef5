//! A vring that stops in one process and goes on in another, or in this one.

use std::io;

use super::{Addresses, Complete, Kick, Running, Setup, State, Vring};
use crate::addr::{Address, Gpa, Qva};
use crate::engine::{Engine, Layout};
use crate::handover::{self, Incoming, Outgoing, RingState};
use crate::memory::MemTable;
use crate::vhost_user::Error;
use crate::vhost_user::session::event_fd;

impl Vring {
    /// Drains and stops a running vring. It stays complete, and [`Self::start`] lets it go on where it stopped.
    pub(in super::super) fn pause(&mut self, engine: &Engine) -> Result<(), Error> {
        let State::Running(Running { complete, .. }) = &mut self.state else { return Ok(()) };
        complete.base = engine.stop_ring(self.index)?.or(complete.base);
        if let State::Running(Running { complete, .. }) = std::mem::take(&mut self.state) {
            self.state = State::Complete(complete);
        }
        Ok(())
    }

    /// Describes a vring that does not run.
    pub(in super::super) fn describe(&self, outgoing: &mut Outgoing) -> io::Result<RingState> {
        let (size, addresses, base, kick) = match &self.state {
            State::Setup(Setup { size, addresses, base, kick }) => (*size, *addresses, *base, kick.as_ref()),
            State::Complete(complete) | State::Running(Running { complete, .. }) => {
                let Complete { size, addresses, base, kick } = complete;
                (Some(*size), Some(*addresses), *base, Some(kick))
            }
        };
        let kick = match kick {
            Some(Kick::Event(fd)) => Some(handover::Kick::Event(outgoing.push(fd)?)),
            Some(Kick::Polled) => Some(handover::Kick::Polled),
            None => None,
        };
        Ok(RingState {
            size: size.map(u32::from),
            addresses: addresses.map(|Addresses { desc, avail, used }| [desc.0, avail.0, used.0]),
            used_log: self.used_log.map(|address| address.0),
            base,
            kick,
            call: outgoing.push_some(self.call.as_ref())?,
            err: outgoing.push_some(self.err.as_ref())?,
            enabled: self.enabled,
        })
    }

    /// Restores a new vring, as if the front-end had sent the messages. It does not start.
    ///
    /// # Errors
    /// As for these messages.
    pub(in super::super) fn restore(
        &mut self,
        state: &RingState,
        descriptors: &mut Incoming,
        layout: Option<Layout>,
    ) -> Result<(), Error> {
        let mut event = |request, number| -> Result<_, Error> {
            let fd = descriptors.take_some(number)?;
            event_fd(request, fd.map(Into::into))
        };
        self.call = event("SET_VRING_CALL", state.call)?;
        self.err = event("SET_VRING_ERR", state.err)?;
        let kick = match state.kick {
            Some(handover::Kick::Event(number)) => event("SET_VRING_KICK", Some(number))?.map(Kick::Event),
            Some(handover::Kick::Polled) => Some(Kick::Polled),
            None => None,
        };
        if let Some(size) = state.size {
            self.set_size(size, layout)?;
        }
        if let Some([desc, avail, used]) = state.addresses {
            self.set_addresses(Addresses { desc: Qva(desc), avail: Qva(avail), used: Qva(used) })?;
        }
        if let Some(base) = state.base {
            self.set_base(base, layout)?;
        }
        if kick.is_some() {
            self.update("SET_VRING_KICK", |setup| setup.kick = kick)?;
        }
        (self.enabled, self.used_log) = (state.enabled, state.used_log.map(Gpa));
        Ok(())
    }

    /// Sets the base of a split ring to the used index in its memory. It stays as it is if that is not in memory, where the ring
    /// cannot start either.
    pub(in super::super) fn rebase(&mut self, table: &MemTable) {
        // virtio 1.2 §2.7.8: flags, then idx.
        const IDX: u64 = 2;
        let State::Complete(complete) = &mut self.state else { return };
        let Some(index) = complete.addresses.used.0.checked_add(IDX).and_then(|at| table.gpa(Qva(at), 2)) else {
            return;
        };
        let region = table.regions().iter().find(|region| region.gpa().contains(index.start()));
        let Some(region) = region.filter(|_| index.start().is_aligned(2)) else { return };
        let offset = usize::try_from(index.start().raw() - region.gpa().start().raw()).expect("mapped");
        complete.base = Some(region.memory().load_acquire_u16(offset).into());
    }
}
