//! Hands the controller over to another process. It is disabled meanwhile, and each process has queues of its own: a controller
//! forgets its queues when it is disabled (NVMe 2.0 §3.7.2), and a reset takes as long as the drive says (CAP.TO).

use super::controller::route_removal;
use super::{Nvme, NvmeErrorKind};
use crate::driver::{DiskState, Driver};

impl Nvme {
    pub(super) fn state_for_successor(&self) -> Option<DiskState> {
        let [namespace] = &*self.namespaces else { return None };
        (!self.is_released()).then(|| DiskState {
            serial: self.identity.serial.clone(),
            namespace: namespace.id,
            identifiers: namespace.identifiers,
            block_size: namespace.block_size,
            zone_blocks: namespace.zones.map_or(0, |zones| zones.blocks),
            write_cache: self.write_cache,
        })
    }

    /// Checks that this is the disk that the predecessor has served, and repeats the predecessor's settings.
    ///
    /// # Errors
    /// What is different, or why a setting cannot be made.
    pub fn continue_from(&mut self, before: &DiskState) -> anyhow::Result<()> {
        let now = self.state_for_successor().ok_or_else(|| self.error(NvmeErrorKind::Stopped))?;
        let wanted = DiskState { write_cache: now.write_cache, ..before.clone() };
        if now != wanted {
            let difference = format!("{now:?} instead of {wanted:?}");
            return Err(self.error(NvmeErrorKind::Changed(difference)));
        }
        before.write_cache.map_or(Ok(()), |on| self.set_write_cache(on))
    }

    pub(super) fn stop_for_successor(&mut self) -> Result<(), NvmeErrorKind> {
        self.queues.clear();
        self.admin = None;
        self.controller.as_mut().ok_or(NvmeErrorKind::Stopped)?.stop()
    }

    pub(super) fn stop_after_successor(&mut self) -> Result<(), NvmeErrorKind> {
        let Some(controller) = &mut self.controller else { return Ok(()) };
        // The successor may have routed it to itself.
        route_removal(controller.function(), &self.removal_request);
        controller.assume_running();
        controller.stop()?;
        controller.turn_every_interrupt_off();
        Ok(())
    }

    pub(super) fn leave_to_successor(mut self) {
        self.queues.clear();
        self.admin = None;
        if let Some(controller) = self.controller.take() {
            controller.leave();
        }
    }
}
