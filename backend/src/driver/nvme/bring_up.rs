//! Controller initialization, in the order of NVMe 2.0 §3.5.1. When a step fails, [`Controller::stop`] cleans up, so this
//! file has no error paths of its own.
//!
//! ```text
//! disable -> vectors -> enable -> Identify -> namespace -> write cache -> Number of Queues -> CQ, SQ per queue
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::admin::{AdminCommand, AdminQueue};
use super::command_set;
use super::controller::Controller;
use super::error::NvmeErrorKind;
use super::identify::{
    Identity, Namespace, active_namespaces, format_ids, format_index, range_limits, select_namespace,
};
use super::interrupts::{Interrupts, QueueInterrupt, SharedVector, Wiring};
use super::logs::RESETS;
use super::options::{Avoid, NvmeOptions};
use super::path;
use super::prp::Limits;
use super::queue::{IoQueue, MAX_DEPTH, QueueSetup, Tags, completions_at, memory_needed};
use super::regs::{PAGE_LEN, Version};
use super::sgl::Granularity;
use super::spec::{IdentifyController, IdentifyNamespace, IdentifyNvmController, cns};
use super::zones::{IdentifyZonedNamespace, Zones, longest_append};
use crate::addr::Bytes;
use crate::driver::{DiscardLimits, Geometry, ZeroesLimits, ZoneGeometry};

/// Time-out of each admin command during initialization. Some drives complete Identify only after their own start-up.
const BRING_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// What initialization yields.
pub(super) struct BroughtUp {
    pub(super) admin: AdminQueue,
    pub(super) geometry: Geometry,
    pub(super) queues: Vec<IoQueue>,
    pub(super) shutdown_limit: Duration,
    pub(super) identity: Identity,
    /// The namespace to serve.
    pub(super) namespace: Namespace,
    pub(super) wiring: Wiring,
}

/// Initializes `controller`. The admin queue's interrupt signals `admin_event`. On error the caller must stop the controller.
pub(super) fn bring_up(
    controller: &mut Controller,
    options: &NvmeOptions,
    admin_event: BorrowedFd<'_>,
) -> Result<BroughtUp, NvmeErrorKind> {
    controller.disable()?;
    let Interrupts { wiring, mut events } = Interrupts::route(controller, options, admin_event)?;
    let (mut admin, rings) = AdminQueue::new(controller)?;
    controller.enable(&rings)?;
    let command = AdminCommand::identify("Identify Controller", cns::CONTROLLER, 0);
    let data: IdentifyController = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
    let mut identity = Identity::decode(&data)?;
    identity.avoid(&options.avoid);
    let namespace = find_namespace(controller, &mut admin, &identity, options.namespace)?;
    let limits = command_limits(controller, &mut admin, &identity, &namespace)?;
    let cache_on = identity.write_cache && write_cache_is_on(controller, &mut admin);
    events.truncate(negotiate_queues(controller, &mut admin, events.len())?);
    let transfers = Limits { block: namespace.block_size, transfer: identity.max_transfer };
    let shared_tags = options.avoid.contains(&Avoid::Tags);
    if shared_tags {
        events.truncate(1);
    }
    let depth = u16::try_from(controller.capabilities().max_queue_entries()).map_or(MAX_DEPTH, |n| n.min(MAX_DEPTH));
    let depth = if shared_tags { admin.share_tags(depth)? } else { depth };
    let parameters = |id, interrupt| QueueParameters {
        id,
        depth,
        namespace: namespace.id,
        metadata: namespace.metadata,
        limits: transfers,
        sgl: identity.sgl,
        vector: wiring.vector(id),
        interrupt,
        tags: if shared_tags { Tags::Shared } else { Tags::Own },
    };
    let mut queues = Vec::new();
    for (id, event) in (1..).zip(events) {
        let interrupt = queue_interrupt(controller, &admin, (wiring, id), event, admin_event)?;
        queues.push(create_queue(controller, &mut admin, parameters(id, interrupt))?);
    }
    let geometry = geometry(options, &identity, &namespace, cache_on, limits);
    let shutdown_limit = identity.shutdown_limit;
    let mut up = BroughtUp { admin, geometry, queues, shutdown_limit, identity, namespace, wiring };
    log_summary(controller, &up, depth);
    if up.identity.namespace_notices {
        enable_namespace_events(controller, &mut up.admin)?;
    }
    Ok(up)
}

fn geometry(
    options: &NvmeOptions,
    identity: &Identity,
    namespace: &Namespace,
    cache_on: bool,
    CommandLimits { discard, zeroes, zones }: CommandLimits,
) -> Geometry {
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
        serial: identity.serial.clone(),
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

fn log_summary(controller: &Controller, up: &BroughtUp, depth: u16) {
    let BroughtUp { identity, namespace, geometry, queues, wiring, .. } = up;
    let name = controller.function().name();
    RESETS.info(|| {
        format!(
            "{name}: {} (serial {}, firmware {}, NVMe {}), namespace {}: {} blocks of {}, write cache {}",
            identity.model,
            identity.serial,
            identity.firmware,
            controller.version(),
            namespace.id,
            namespace.blocks,
            namespace.block_size,
            match (identity.write_cache, geometry.cache_on) {
                (false, _) => "none",
                (true, false) => "off",
                (true, true) => "on",
            },
        )
    });
    if let Some(zones) = geometry.zones {
        let (size, append) = (Bytes(zones.blocks * u64::from(geometry.block_size)), Bytes(zones.max_append.into()));
        let (open, active) = (zones.max_open, zones.max_active);
        RESETS.info(|| {
            format!("{name}: zones of {size}, appends up to {append}, most open {open}, active {active} (0: no limit)")
        });
    }
    let transfer = Bytes(geometry.max_transfer.into());
    let sgl = match identity.sgl {
        None => "",
        Some(Granularity::Byte) => ", SGLs",
        Some(Granularity::Dword) => ", SGLs of dwords",
    };
    RESETS.info(|| {
        format!("{name}: {} queues of {depth} entries, {wiring}, transfers up to {transfer}{sgl}", queues.len())
    });
}

/// Enables namespace attribute notices. A refusal is not fatal: only size changes go unnoticed.
fn enable_namespace_events(controller: &Controller, admin: &mut AdminQueue) -> Result<(), NvmeErrorKind> {
    match admin.execute(controller, AdminCommand::set_async_events(), BRING_UP_TIMEOUT) {
        Ok(_) => admin.request_event(),
        Err(error @ NvmeErrorKind::CommandFailed { .. }) => {
            RESETS.warn(|| format!("{}: {error}; size changes will not be noticed", controller.function().name()));
            Ok(())
        }
        Err(kind) => Err(kind),
    }
}

/// Selects the namespace to serve and checks that this driver supports it.
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

/// Limits of the commands other than transfers.
struct CommandLimits {
    discard: Option<DiscardLimits>,
    zeroes: Option<ZeroesLimits>,
    zones: Option<ZoneGeometry>,
}

/// Limits of commands on `namespace`. Discards have no use on zones, which are reset, and VIRTIO_BLK_F_DISCARD is forbidden with
/// them (virtio 1.3 §5.2.5.1). Zeroes would have to be written in order, which the guest's own writes do as well.
fn command_limits(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    namespace: &Namespace,
) -> Result<CommandLimits, NvmeErrorKind> {
    let Some(Zones { blocks, max_open, max_active }) = namespace.zones else {
        let limits = identify_limits(controller, admin)?;
        let (discard, zeroes) = range_limits(identity, namespace, limits.as_ref());
        return Ok(CommandLimits { discard, zeroes, zones: None });
    };
    let name = "Identify (Zoned Namespace command set, controller)";
    let command = AdminCommand::identify_of_set(name, cns::COMMAND_SET_CONTROLLER, 0, command_set::ZONED);
    let data = admin.identify(controller, command, BRING_UP_TIMEOUT)?;
    let max_append = longest_append(&data, identity.max_transfer);
    let zones = Some(ZoneGeometry { blocks, max_open, max_active, max_append });
    Ok(CommandLimits { discard: None, zeroes: None, zones })
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

/// Reads whether the write cache is enabled. If that fails, assume it is: a needless flush costs time, a missing one data.
fn write_cache_is_on(controller: &Controller, admin: &mut AdminQueue) -> bool {
    match admin.execute(controller, AdminCommand::get_volatile_write_cache(), BRING_UP_TIMEOUT) {
        Ok(enabled) => enabled & 1 == 1,
        Err(error) => {
            RESETS.warn(|| format!("{}: {error}; assuming that its write cache is on", controller.function().name()));
            true
        }
    }
}

/// Negotiates the number of I/O queues with the controller; at most `wanted`.
fn negotiate_queues(controller: &Controller, admin: &mut AdminQueue, wanted: usize) -> Result<usize, NvmeErrorKind> {
    let wanted = u16::try_from(wanted).expect("one event per vector");
    let granted = admin.execute(controller, AdminCommand::set_number_of_queues(wanted), BRING_UP_TIMEOUT)?;
    // NSQA in the low half, NCQA in the high half, both 0's based. NVMe 2.0 §5.27.1.5
    let granted = (granted & 0xffff).min(granted >> 16) + 1;
    let queues = granted.min(wanted.into());
    if queues < wanted.into() {
        RESETS.info(|| format!("{}: grants {granted} of {wanted} queues", controller.function().name()));
    }
    Ok(usize::try_from(queues).expect("at most 65536"))
}

/// The interrupt of I/O queue `id`, which `event` reports.
fn queue_interrupt(
    controller: &Controller,
    admin: &AdminQueue,
    (wiring, id): (Wiring, u16),
    event: OwnedFd,
    admin_event: BorrowedFd<'_>,
) -> Result<QueueInterrupt, NvmeErrorKind> {
    let function = controller.shared_function();
    Ok(match wiring {
        Wiring::Own(_) => QueueInterrupt::own(event, function.interrupt_wanted(id)),
        Wiring::Shared(_) => {
            let admin_event = admin_event.try_clone_to_owned().map_err(NvmeErrorKind::function("eventfd"))?;
            let wanted = if wiring.is_line() { None } else { function.interrupt_wanted(0) };
            let shared = SharedVector::new(admin.watch(), admin_event, wiring.is_line().then_some(function));
            QueueInterrupt::shared(event, wanted, shared)
        }
        Wiring::Polled => QueueInterrupt::polled(event),
    })
}

struct QueueParameters {
    id: u16,
    depth: u16,
    namespace: u32,
    metadata: u16,
    limits: Limits,
    sgl: Option<Granularity>,
    vector: Option<u16>,
    interrupt: QueueInterrupt,
    tags: Tags,
}

fn create_queue(
    controller: &mut Controller,
    admin: &mut AdminQueue,
    wanted: QueueParameters,
) -> Result<IoQueue, NvmeErrorKind> {
    let QueueParameters { id, depth, namespace, metadata, limits, sgl, vector, interrupt, tags } = wanted;
    let memory = controller.memory("an I/O queue", memory_needed(depth))?;
    let completions = memory.iova.0 + completions_at(depth) as u64;
    admin.execute(
        controller,
        AdminCommand::create_completion_queue(id, depth, completions, vector),
        BRING_UP_TIMEOUT,
    )?;
    admin.execute(controller, AdminCommand::create_submission_queue(id, depth, memory.iova.0), BRING_UP_TIMEOUT)?;
    let name = format!("{} queue {id}", controller.function().name());
    let queue = IoQueue::new(QueueSetup {
        name,
        id,
        depth,
        memory,
        doorbells: controller.doorbells(),
        namespace,
        limits,
        sgl,
        interrupt,
        tags,
    });
    if metadata == 0 {
        return Ok(queue);
    }
    let bytes = usize::try_from(limits.transfer / limits.block * u32::from(metadata)).expect("at most 512 KiB");
    Ok(queue.with_metadata(&controller.memory("metadata", 2 * bytes.next_multiple_of(PAGE_LEN))?))
}
