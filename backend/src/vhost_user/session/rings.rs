//! What the messages about vrings do.

use std::time::{Duration, Instant};

use super::Session;
use crate::engine::Layout;
use crate::vhost_user::Error;
use crate::vhost_user::features::{Names, ProtocolFeatures};
use crate::vhost_user::vring::{Stop, Vring, VringContext};

/// How long requests have to complete when a front-end asks not to wait for them. They then cost a reset of the controller, which
/// takes about as long (CAP.TO counts in units of 500 ms, NVMe 2.0 §3.1.3.1), delays every other ring, and has the drive do them
/// twice. A drive that works has completed all that it has long before that.
const SUSPEND_AFTER: Duration = Duration::from_millis(100);

impl Session<'_> {
    pub(super) fn ring(&mut self, index: u32) -> Result<&mut Vring, Error> {
        let queues = self.device.queues;
        let position = usize::try_from(index).ok();
        position.and_then(|index| self.rings.get_mut(index)).ok_or(Error::NoSuchRing { index, queues })
    }

    /// Applies a message to a vring, and starts the vring if it can run now.
    pub(super) fn set_up_ring(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring) -> Result<(), Error>,
    ) -> Result<(), Error> {
        change(self.ring(index)?)?;
        if !self.is_served {
            return Ok(());
        }
        let (engine, table, inflight) = (&self.device.engine, self.memory.table(), self.inflight.as_ref());
        let log = self.log.log.as_deref();
        let context = VringContext { engine, table, inflight, log, features: self.features };
        let position = usize::try_from(index).expect("`ring` has checked the index");
        let is_doubtful = self.rings[position].is_doubtful(self.layout());
        let has_started = self.rings[position].start(context)?;
        if has_started && !std::mem::replace(&mut self.features_logged, true) {
            let (virtio, protocol) = (Names(self.features.unwrap_or_default()), Names(self.protocol));
            self.logs.connections.info(|| format!("{}: virtio {virtio}; protocol {protocol}", self.peer));
        }
        if has_started && is_doubtful {
            self.logs.connections.warn(|| {
                format!(
                    "virtqueue {index}: SET_VRING_BASE 0 for a packed ring, whose wrap counters are 1 at the start (0x80008000); if \
                     its requests are not answered, the front-end starts packed rings wrongly, and needs --rings split"
                )
            });
        }
        self.tell_of_missing_log(position);
        Ok(())
    }

    /// Starts every vring that can run now.
    pub(super) fn start_rings(&mut self) {
        if !self.is_served {
            return;
        }
        let (engine, table, inflight) = (&self.device.engine, self.memory.table(), self.inflight.as_ref());
        let log = self.log.log.as_deref();
        let context = VringContext { engine, table, inflight, log, features: self.features };
        for ring in &mut self.rings {
            // Not an error of this message. The next message about the vring reports it.
            if let Err(error) = ring.start(context) {
                log::debug!("{error}");
            }
        }
    }

    /// GET_VRING_BASE.
    pub(super) fn stop_ring(&mut self, index: u32) -> Result<u32, Error> {
        let recorded = self.protocol.contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT);
        self.stop_ring_and(index, if recorded { Stop::DrainOrSuspend } else { Stop::Drain })
    }

    /// GET_VRING_BASE_SKIP_DRAIN.
    pub(in super::super) fn suspend_ring(&mut self, index: u32) -> Result<u32, Error> {
        self.stop_ring_and(index, Stop::Suspend { limit: SUSPEND_AFTER })
    }

    fn stop_ring_and(&mut self, index: u32, stop: Stop) -> Result<u32, Error> {
        let engine = &self.device.engine;
        let first = self.layout().unwrap_or(Layout::Split).first_base();
        let base = self.stopping_rings(|session| session.ring(index).and_then(|ring| ring.stop(engine, stop)));
        Ok(base?.unwrap_or(first))
    }

    /// Does `stop`, which stops one or more vrings, and what follows from it.
    pub(super) fn stopping_rings<T>(&mut self, stop: impl FnOnce(&mut Self) -> T) -> T {
        let runs = |session: &Self| session.rings.iter().any(Vring::is_running);
        let ran = runs(self);
        let result = stop(self);
        self.drop_unused_log();
        if ran && !runs(self) {
            self.stopped_at = Some(Instant::now());
        }
        result
    }
}
