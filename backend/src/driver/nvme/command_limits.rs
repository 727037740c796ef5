//! The limits of the commands that are no transfers, by namespace.

use super::admin::{AdminCommand, AdminQueue};
use super::bring_up::BRING_UP_TIMEOUT;
use super::command_set;
use super::controller::Controller;
use super::error::NvmeErrorKind;
use super::identify::{Identity, Namespace, range_limits};
use super::regs::Version;
use super::spec::{IdentifyNvmController, cns};
use super::zones::{Zones, longest_append};
use crate::driver::{DiscardLimits, ZeroesLimits, ZoneGeometry};

/// Limits of the commands other than transfers.
pub(super) struct CommandLimits {
    pub(super) discard: Option<DiscardLimits>,
    pub(super) zeroes: Option<ZeroesLimits>,
    pub(super) zones: Option<ZoneGeometry>,
}

/// Limits of commands on each of `namespaces`. Discards have no use on zones, which are reset, and VIRTIO_BLK_F_DISCARD is forbidden
/// with them (virtio 1.3 §5.2.5.1). Zeroes would have to be written in order, which the guest's own writes do as well.
pub(super) fn command_limits(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    namespaces: &[Namespace],
) -> Result<Vec<CommandLimits>, NvmeErrorKind> {
    let ranges = if namespaces.iter().all(|namespace| namespace.zones.is_some()) {
        None
    } else {
        identify_limits(controller, admin)?
    };
    let mut all = Vec::with_capacity(namespaces.len());
    for namespace in namespaces {
        let Some(Zones { blocks, max_open, max_active }) = namespace.zones else {
            let (discard, zeroes) = range_limits(identity, namespace, ranges.as_ref());
            all.push(CommandLimits { discard, zeroes, zones: None });
            continue;
        };
        let name = "Identify (Zoned Namespace command set, controller)";
        let command = AdminCommand::identify_of_set(name, cns::COMMAND_SET_CONTROLLER, 0, command_set::ZONED);
        let data = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
        let max_append = longest_append(&data, identity.max_transfer);
        let zones = Some(ZoneGeometry { blocks, max_open, max_active, max_append });
        all.push(CommandLimits { discard: None, zeroes: None, zones });
    }
    Ok(all)
}

/// The controller's limits of commands without data transfer. The data structure is newer than NVMe 1.4 and no capability
/// bit announces it, so an error status means only that the controller does not have it.
fn identify_limits(
    controller: &Controller,
    admin: &mut AdminQueue,
) -> Result<Option<IdentifyNvmController>, NvmeErrorKind> {
    if controller.version() < Version(0x0001_0400) {
        return Ok(None);
    }
    let name = "Identify (I/O Command Set Specific Controller)";
    let command = AdminCommand::identify(name, cns::COMMAND_SET_CONTROLLER, 0);
    match admin.identify(controller, command, BRING_UP_TIMEOUT) {
        Ok(limits) => Ok(Some(limits)),
        Err(NvmeErrorKind::CommandFailed { .. }) => Ok(None),
        Err(kind) => Err(kind),
    }
}
