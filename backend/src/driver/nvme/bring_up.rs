//! Controller initialization, in the order of NVMe 2.0 §3.5.1. When a step fails, [`Controller::stop`] cleans up, so this
//! file has no error paths of its own.
//!
//! ```text
//! disable -> vectors -> enable -> Identify -> namespace -> write cache -> Number of Queues -> CQ, SQ per queue
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::admin::{AdminCommand, AdminQueue};
use super::command_limits::command_limits;
use super::controller::Controller;
use super::error::NvmeErrorKind;
use super::identify::{Identity, Namespace};
use super::interrupts::{Interrupts, QueueInterrupt, SharedVector, Wiring};
use super::logs::RESETS;
use super::namespaces::{divide, find_namespaces, geometry};
use super::options::{Avoid, NvmeOptions};
use super::prp::Limits;
use super::queue::{IoQueue, MAX_DEPTH, QueueSetup, Tags, completions_at, memory_needed};
use super::regs::PAGE_LEN;
use super::sgl::Granularity;
use super::spec::{IdentifyController, cns};
use crate::addr::Bytes;
use crate::driver::Geometry;

/// Time-out of each admin command during initialization. Some drives complete Identify only after their own start-up.
pub(super) const BRING_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// What initialization yields.
pub(super) struct BroughtUp {
    pub(super) admin: AdminQueue,
    /// Of each namespace.
    pub(super) geometries: Vec<Geometry>,
    pub(super) queues: Vec<IoQueue>,
    pub(super) shutdown_limit: Duration,
    pub(super) identity: Identity,
    /// The namespaces to serve, one disk each.
    pub(super) namespaces: Vec<Namespace>,
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
    let namespaces = find_namespaces(controller, &mut admin, &identity, &options.namespaces)?;
    let limits = command_limits(controller, &mut admin, &identity, &namespaces)?;
    let cache_on = identity.write_cache && write_cache_is_on(controller, &mut admin);
    events.truncate(negotiate_queues(controller, &mut admin, events.len())?);
    let shared_tags = options.avoid.contains(&Avoid::Tags);
    if shared_tags {
        events.truncate(1);
    }
    let disks = divide(events.len(), namespaces.len())?;
    let depth = u16::try_from(controller.capabilities().max_queue_entries()).map_or(MAX_DEPTH, |n| n.min(MAX_DEPTH));
    let depth = if shared_tags { admin.share_tags(depth)? } else { depth };
    let parameters = |id, disk, interrupt| QueueParameters {
        id,
        depth,
        disk,
        namespace: &namespaces[disk],
        transfer: identity.max_transfer,
        sgl: identity.sgl,
        vector: wiring.vector(id),
        interrupt,
        tags: if shared_tags { Tags::Shared } else { Tags::Own },
    };
    let mut queues = Vec::new();
    for ((id, event), disk) in (1..).zip(events).zip(disks) {
        let interrupt = queue_interrupt(controller, &admin, (wiring, id), event, admin_event)?;
        queues.push(create_queue(controller, &mut admin, parameters(id, disk, interrupt))?);
    }
    let geometry = |(namespace, limits)| geometry(options, &identity, namespace, cache_on, limits);
    let geometries = namespaces.iter().zip(limits).map(geometry).collect();
    let shutdown_limit = identity.shutdown_limit;
    let mut up = BroughtUp { admin, geometries, queues, shutdown_limit, identity, namespaces, wiring };
    log_summary(controller, &up, depth);
    if up.identity.namespace_notices {
        enable_namespace_events(controller, &mut up.admin)?;
    }
    Ok(up)
}

fn log_summary(controller: &Controller, up: &BroughtUp, depth: u16) {
    let BroughtUp { identity, namespaces, geometries, queues, wiring, .. } = up;
    let name = controller.function().name();
    let blocks = |namespace: &Namespace| {
        format!("namespace {}: {} blocks of {}, ", namespace.id, namespace.blocks, namespace.block_size)
    };
    RESETS.info(|| {
        format!(
            "{name}: {} (serial {}, firmware {}, NVMe {}), {}write cache {}",
            identity.model,
            identity.serial,
            identity.firmware,
            controller.version(),
            namespaces.iter().map(blocks).collect::<String>(),
            match (identity.write_cache, geometries.iter().any(|geometry| geometry.cache_on)) {
                (false, _) => "none",
                (true, false) => "off",
                (true, true) => "on",
            },
        )
    });
    geometries.iter().for_each(|geometry| log_zones(name, geometry));
    let transfer = Bytes(identity.max_transfer.into());
    let sgl = match identity.sgl {
        None => "",
        Some(Granularity::Byte) => ", SGLs",
        Some(Granularity::Dword) => ", SGLs of dwords",
    };
    RESETS.info(|| {
        format!("{name}: {} queues of {depth} entries, {wiring}, transfers up to {transfer}{sgl}", queues.len())
    });
}

/// The zones of a zoned namespace.
fn log_zones(name: &str, geometry: &Geometry) {
    let Some(zones) = geometry.zones else { return };
    let (size, append) = (Bytes(zones.blocks * u64::from(geometry.block_size)), Bytes(zones.max_append.into()));
    let (open, active) = (zones.max_open, zones.max_active);
    RESETS.info(|| {
        format!("{name}: zones of {size}, appends up to {append}, most open {open}, active {active} (0: no limit)")
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

struct QueueParameters<'n> {
    id: u16,
    depth: u16,
    disk: usize,
    namespace: &'n Namespace,
    /// Longest transfer, bytes.
    transfer: u32,
    sgl: Option<Granularity>,
    vector: Option<u16>,
    interrupt: QueueInterrupt,
    tags: Tags,
}

fn create_queue(
    controller: &mut Controller,
    admin: &mut AdminQueue,
    wanted: QueueParameters<'_>,
) -> Result<IoQueue, NvmeErrorKind> {
    let QueueParameters { id, depth, disk, namespace, transfer, sgl, vector, interrupt, tags } = wanted;
    let limits = Limits { block: namespace.block_size, transfer };
    let metadata = namespace.metadata;
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
        disk,
        namespace: namespace.id,
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
