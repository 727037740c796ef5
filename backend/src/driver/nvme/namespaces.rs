//! The namespaces that are served: each is a disk with I/O queues of its own. The controller, its admin queue and its write cache
//! are common to them.

use super::admin::{AdminCommand, AdminQueue};
use super::bring_up::BRING_UP_TIMEOUT;
use super::command_limits::CommandLimits;
use super::command_set;
use super::controller::Controller;
use super::error::NvmeErrorKind;
use super::identify::{Identity, Namespace, active_namespaces, format_ids, format_index, select_namespace};
use super::logs::RESETS;
use super::options::NvmeOptions;
use super::path;
use super::regs::Version;
use super::spec::{IdentifyNamespace, cns};
use super::zones::{IdentifyZonedNamespace, Zones};
use crate::driver::Geometry;

/// Bytes of a serial number that a guest can ask for (virtio 1.2 §5.2.6, VIRTIO_BLK_T_GET_ID).
const SERIAL_BYTES: usize = 20;

/// The disk that each of `queues` queues serves: each disk has consecutive ones, and the first have one more if they cannot be
/// divided evenly.
pub(super) fn divide(queues: usize, disks: usize) -> Result<Vec<usize>, NvmeErrorKind> {
    if queues < disks {
        return Err(NvmeErrorKind::TooFewQueues { queues, namespaces: disks });
    }
    Ok((0..queues).map(|index| index * disks / queues).collect())
}

/// Selects the namespaces to serve, the only one if none is `wanted`, and checks that this driver supports them.
pub(super) fn find_namespaces(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    wanted: &[u32],
) -> Result<Vec<Namespace>, NvmeErrorKind> {
    let mut find = |wanted| find_namespace(controller, admin, identity, wanted);
    if wanted.is_empty() { Ok(vec![find(None)?]) } else { wanted.iter().map(|id| find(Some(*id))).collect() }
}

fn find_namespace(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    wanted: Option<u32>,
) -> Result<Namespace, NvmeErrorKind> {
    // NVMe 1.0 has no list of active namespaces. Each of 1 to NN may be active, which NSZE tells.
    if controller.version() < Version(0x0001_0100) {
        let all = format!("1 to {}", identity.namespaces);
        let id = match wanted {
            Some(id) => id,
            None if identity.namespaces <= 1 => 1,
            None => return Err(NvmeErrorKind::SeveralNamespaces { existing: all }),
        };
        let valid = (1..=identity.namespaces).contains(&id);
        let found = if valid { identify_namespace(controller, admin, identity, id)? } else { None };
        return found.ok_or(NvmeErrorKind::NamespaceNotFound { wanted: id, existing: all });
    }
    let command = AdminCommand::identify("Identify (Active Namespace ID list)", cns::ACTIVE_NAMESPACES, 0);
    let list: [u8; 4096] = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
    let active = active_namespaces(&list);
    let id = select_namespace(wanted, &active)?;
    if active.len() > 1 {
        RESETS.info(|| format!("{}: serving namespace {id} of {}", controller.function().name(), format_ids(&active)));
    }
    let found = identify_namespace(controller, admin, identity, id)?;
    found.ok_or_else(|| NvmeErrorKind::NamespaceNotFound { wanted: id, existing: format_ids(&active) })
}

/// What a namespace is now; `None` if there is no such.
pub(super) fn identify_namespace(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    id: u32,
) -> Result<Option<Namespace>, NvmeErrorKind> {
    let mut set = command_set::NVM;
    // A controller with one command set has no other, and need not know the descriptor.
    if controller.capabilities().several_command_sets() {
        let name = "Identify (Namespace Identification Descriptor list)";
        let list = admin.identify(controller, AdminCommand::identify(name, cns::DESCRIPTORS, id), BRING_UP_TIMEOUT)?;
        set = command_set::identifier(&list);
        command_set::check(id, set)?;
    }
    let command = AdminCommand::identify("Identify Namespace", cns::NAMESPACE, id);
    let data: IdentifyNamespace = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
    // Before the decoding: what cannot be reached reports no capacity.
    if identity.path_states && data.anagrpid != 0 {
        check_path(controller, admin, id, data.anagrpid)?;
    }
    let namespace = Namespace::decode(id, &data, identity)?;
    match namespace {
        Some(namespace) if set == command_set::ZONED => {
            let name = "Identify (Zoned Namespace)";
            let command = AdminCommand::identify_of_set(name, cns::COMMAND_SET_NAMESPACE, id, set);
            let zoned: IdentifyZonedNamespace = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
            let zones = Some(Zones::decode(&zoned, format_index(&data), namespace.block_size)?);
            Ok(Some(Namespace { zones, ..namespace }))
        }
        other => Ok(other),
    }
}

/// Checks that namespace `id`, of ANA group `group`, can be reached by this controller.
fn check_path(controller: &Controller, admin: &mut AdminQueue, id: u32, group: u32) -> Result<(), NvmeErrorKind> {
    match admin.identify(controller, AdminCommand::get_path_states(), BRING_UP_TIMEOUT) {
        Ok(log) => path::check(id, path::state(&log, group).unwrap_or_default()),
        Err(error @ NvmeErrorKind::CommandFailed { .. }) => {
            RESETS.warn(|| {
                format!("{}: {error}; assuming that namespace {id} can be reached", controller.function().name())
            });
            Ok(())
        }
        Err(kind) => Err(kind),
    }
}

/// What the user of a namespace can see of it.
pub(super) fn geometry(
    options: &NvmeOptions,
    identity: &Identity,
    namespace: &Namespace,
    cache_on: bool,
    CommandLimits { discard, zeroes, zones }: CommandLimits,
) -> Geometry {
    let several = options.namespaces.len() > 1;
    Geometry {
        blocks: namespace.blocks,
        block_size: namespace.block_size,
        physical_block_size: namespace.physical_block_size,
        alignment_offset: namespace.alignment_offset,
        optimal_size: namespace.optimal_size,
        boundary: boundary(namespace),
        read_only: options.read_only || namespace.write_protected,
        volatile_cache: identity.write_cache,
        cache_on,
        serial: if several { serial_of(&identity.serial, namespace.id) } else { identity.serial.clone() },
        model: identity.model.clone(),
        max_transfer: identity.max_transfer,
        discard,
        zeroes,
        zones,
    }
}

/// A transfer that crosses from one zone into the next fails, so zones are a boundary unless NOIOB divides them.
fn boundary(namespace: &Namespace) -> u32 {
    let zone = namespace.zones.map_or(0, |zones| u32::try_from(zones.blocks).expect("checked by Zones::decode"));
    let preferred = namespace.boundary;
    if zone == 0 || preferred != 0 && zone.is_multiple_of(preferred) { preferred } else { zone }
}

/// Tells the disks of one controller apart, as udev does on a host. The end of a long serial number gives way, because it is the
/// only part of both that may.
fn serial_of(serial: &str, namespace: u32) -> String {
    let id = format!("_{namespace}");
    let kept = serial.len().min(SERIAL_BYTES - id.len());
    format!("{}{id}", &serial[..kept])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_has_consecutive_queues_and_the_first_the_odd_ones() {
        for (queues, disks, expected) in [
            (4, 1, &[0, 0, 0, 0][..]),
            (4, 2, &[0, 0, 1, 1]),
            (5, 2, &[0, 0, 0, 1, 1]),
            (4, 3, &[0, 0, 1, 2]),
            (3, 3, &[0, 1, 2]),
        ] {
            assert_eq!(divide(queues, disks).unwrap(), expected, "{queues} queues, {disks} disks");
        }
        assert!(divide(1, 2).is_err());
    }

    #[test]
    fn the_serial_numbers_of_a_controllers_disks_differ_and_fit() {
        assert_eq!(serial_of("S1", 2), "S1_2");
        assert_eq!(serial_of("01234567890123456789", 17), "01234567890123456_17");
        assert_eq!(serial_of("01234567890123456789", u32::MAX).len(), SERIAL_BYTES);
    }
}
