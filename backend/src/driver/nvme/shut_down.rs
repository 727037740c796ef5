//! How the controller is shut down, as before a power-off (NVMe 2.0 §3.6.1).

use std::time::Duration;

use super::admin::{AdminCommand, AdminQueue};
use super::controller::Controller;
use super::{Nvme, NvmeErrorKind};

/// Time-out of each admin command during a shutdown. A healthy controller completes a queue deletion at once; an unhealthy
/// one is shut down through CC.SHN anyway.
const SHUTDOWN_COMMAND_TIMEOUT: Duration = Duration::from_millis(500);

impl Nvme {
    /// Deletes the I/O queues, then requests a normal shutdown. The shutdown does not depend on the deletions, so their
    /// errors are only logged.
    pub(super) fn delete_queues_and_shut_down(
        &self,
        controller: &Controller,
        mut admin: AdminQueue,
    ) -> Result<(), NvmeErrorKind> {
        let ids = 1..=self.queue_count;
        let deletions = ids
            .clone()
            .map(AdminCommand::delete_submission_queue)
            .chain(ids.map(AdminCommand::delete_completion_queue));
        for command in deletions {
            if let Err(error) = admin.execute(controller, command, SHUTDOWN_COMMAND_TIMEOUT) {
                log::warn!("{}: {error}", self.name);
                break;
            }
        }
        controller.notify_shutdown(self.shutdown_limit)
    }
}
