//! From a disabled controller to I/O queues, in the order of NVMe 2.0 §3.5.1. Every step that fails leaves the rest to
//! [`Controller`]'s `stop`, so this file holds no undo code.
//!
//! ```text
//! disable -> vectors -> enable -> Identify -> namespace -> write cache -> Number of Queues -> CQ, SQ per queue
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::NvmeOptions;
use super::admin::{AdminCommand, AdminQueue};
use super::controller::Controller;
use super::error::Cause;
use super::identify::{Identity, Namespace, active_namespaces, choose, listed, range_limits};
use super::prp::Limits;
use super::queue::{IoQueue, MAX_DEPTH, QueueSetup, completions_at, memory_needed};
use super::regs::Version;
use super::sgl::Granularity;
use super::spec::{IdentifyController, IdentifyNamespace, IdentifyNvmController, cns};
use crate::addr::Bytes;
use crate::driver::Geometry;

/// How long an admin command may take while the controller is brought up. Some drives hold Identify back until their
/// own start is complete.
const ADMIN_LIMIT: Duration = Duration::from_secs(30);

/// A controller at work.
pub(super) struct Up {
    pub(super) admin: AdminQueue,
    pub(super) geometry: Geometry,
    pub(super) queues: Vec<IoQueue>,
    pub(super) shutdown_limit: Duration,
    pub(super) identity: Identity,
    /// The one that is served.
    pub(super) namespace: Namespace,
}

/// Brings `controller` up; `notice` will be signalled for the admin queue. On error the caller stops it.
pub(super) fn bring_up(
    controller: &mut Controller,
    options: &NvmeOptions,
    notice: BorrowedFd<'_>,
) -> Result<Up, Cause> {
    controller.disable()?;
    let mut events = route_vectors(controller, options.queues, notice)?;
    let (mut admin, rings) = AdminQueue::new(controller)?;
    controller.enable(&rings)?;
    let data: IdentifyController =
        admin.identify(controller, AdminCommand::identify("Identify Controller", cns::CONTROLLER, 0), ADMIN_LIMIT)?;
    let identity = Identity::decode(&data)?;
    let namespace = find_namespace(controller, &mut admin, &identity, options.namespace)?;
    let command_limits = identify_limits(controller, &mut admin)?;
    let (discard, zeroes) = range_limits(&identity, &namespace, command_limits.as_ref());
    let cache_on = identity.write_cache && write_cache_is_on(controller, &mut admin);
    events.truncate(negotiate_queues(controller, &mut admin, events.len())?);
    let limits = Limits { block: namespace.block_size, transfer: identity.max_transfer };
    let depth = u16::try_from(controller.capabilities().max_queue_entries()).map_or(MAX_DEPTH, |n| n.min(MAX_DEPTH));
    let mut queues = Vec::new();
    for (id, event) in (1..).zip(events) {
        queues.push(create_queue(
            controller,
            &mut admin,
            Wanted { id, depth, namespace: namespace.id, limits, sgl: identity.sgl, event },
        )?);
    }
    let geometry = Geometry {
        blocks: namespace.blocks,
        block_size: namespace.block_size,
        physical_block_size: namespace.physical_block_size,
        read_only: options.read_only || namespace.write_protected,
        volatile_cache: identity.write_cache,
        cache_on,
        serial: identity.serial.clone(),
        model: identity.model.clone(),
        max_transfer: limits.transfer,
        discard,
        zeroes,
    };
    let name = controller.function().name();
    log::info!(
        "{name}: {} (serial {}, firmware {}, NVMe {}), namespace {}: {} blocks of {}, write cache {}",
        identity.model,
        identity.serial,
        identity.firmware,
        controller.version(),
        namespace.id,
        namespace.blocks,
        namespace.block_size,
        match (identity.write_cache, cache_on) {
            (false, _) => "none",
            (true, false) => "off",
            (true, true) => "on",
        },
    );
    let transfer = Bytes(limits.transfer.into());
    let sgl = match identity.sgl {
        None => "",
        Some(Granularity::Byte) => ", SGLs",
        Some(Granularity::Dword) => ", SGLs of dwords",
    };
    log::info!("{name}: {} queues of {depth} entries, transfers up to {transfer}{sgl}", queues.len());
    if identity.notices {
        listen(controller, &mut admin)?;
    }
    let shutdown_limit = identity.shutdown_limit;
    Ok(Up { admin, geometry, queues, shutdown_limit, identity, namespace })
}

/// Asks to be told when the namespace changes. A controller that offers it and then refuses is served all the same.
fn listen(controller: &Controller, admin: &mut AdminQueue) -> Result<(), Cause> {
    match admin.execute(controller, AdminCommand::set_async_events(), ADMIN_LIMIT) {
        Ok(_) => admin.listen(),
        Err(error @ Cause::Command { .. }) => {
            log::warn!("{}: {error}; it will not tell when its size changes", controller.function().name());
            Ok(())
        }
        Err(cause) => Err(cause),
    }
}

/// Makes an eventfd for each I/O queue and routes vectors to them: vector 0, of the admin queue, to `notice`, vector n to I/O
/// queue n.
///
/// This comes before the controller is enabled, because until MSI-X is on it would signal by an interrupt line that
/// nobody serves.
fn route_vectors(controller: &Controller, wanted: u16, notice: BorrowedFd<'_>) -> Result<Vec<OwnedFd>, Cause> {
    let function = controller.function();
    let vectors = function.vectors();
    if vectors < 2 {
        let found = match vectors {
            0 => "0 (no MSI-X)".to_owned(),
            few => few.to_string(),
        };
        return Err(Cause::Unsuitable { property: "number of MSI-X vectors", found, wanted: "2 or more" });
    }
    let queues = wanted.clamp(1, vectors - 1).min(controller.last_queue());
    if queues == 0 {
        let found = "room for those of the admin queue only".to_owned();
        return Err(Cause::Unsuitable { property: "doorbell area", found, wanted: "room for one I/O queue" });
    }
    let event = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let events: Vec<OwnedFd> =
        (1..=queues).map(event).collect::<Result<_, _>>().map_err(|errno| Cause::function("eventfd")(errno.into()))?;
    let borrowed: Vec<_> = std::iter::once(notice).chain(events.iter().map(AsFd::as_fd)).collect();
    function.route_vectors(&borrowed).map_err(Cause::function("turn MSI-X on"))?;
    Ok(events)
}

/// Finds the namespace to serve, and checks that it can be.
fn find_namespace(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    wanted: Option<u32>,
) -> Result<Namespace, Cause> {
    // NVMe 1.0 has no list of namespaces; there all from 1 to NN may be active, and NSZE says which are.
    if controller.version() < Version(0x0001_0100) {
        let all = format!("1 to {}", identity.namespaces);
        let id = match wanted {
            Some(id) => id,
            None if identity.namespaces <= 1 => 1,
            None => return Err(Cause::SeveralNamespaces { existing: all }),
        };
        let valid = (1..=identity.namespaces).contains(&id);
        let found = if valid { identify_namespace(controller, admin, identity, id)? } else { None };
        return found.ok_or(Cause::NoNamespace { wanted: id, existing: all });
    }
    let command = AdminCommand::identify("Identify (Active Namespace ID list)", cns::ACTIVE_NAMESPACES, 0);
    let list: [u8; 4096] = admin.identify(controller, command, ADMIN_LIMIT)?;
    let active = active_namespaces(&list);
    let id = choose(wanted, &active)?;
    if active.len() > 1 {
        log::info!("{}: serving namespace {id} of {}", controller.function().name(), listed(&active));
    }
    let found = identify_namespace(controller, admin, identity, id)?;
    found.ok_or_else(|| Cause::NoNamespace { wanted: id, existing: listed(&active) })
}

/// What a namespace is now; `None` if there is no such.
pub(super) fn identify_namespace(
    controller: &Controller,
    admin: &mut AdminQueue,
    identity: &Identity,
    id: u32,
) -> Result<Option<Namespace>, Cause> {
    let command = AdminCommand::identify("Identify Namespace", cns::NAMESPACE, id);
    let data: IdentifyNamespace = admin.identify(controller, command, ADMIN_LIMIT)?;
    Namespace::decode(id, &data, identity)
}

/// The limits of commands that move no data, from a controller that tells them. The data structure came after NVMe 1.4
/// without a bit to announce it, so a controller that does not know it is no surprise.
fn identify_limits(controller: &Controller, admin: &mut AdminQueue) -> Result<Option<IdentifyNvmController>, Cause> {
    if controller.version() < Version(0x0001_0400) {
        return Ok(None);
    }
    let name = "Identify (I/O Command Set Specific Controller)";
    let command = AdminCommand::identify(name, cns::COMMAND_SET_CONTROLLER, 0);
    match admin.identify(controller, command, ADMIN_LIMIT) {
        Ok(limits) => Ok(Some(limits)),
        Err(Cause::Command { .. }) => Ok(None),
        Err(cause) => Err(cause),
    }
}

/// Asks whether the write cache that is there is on. In doubt it is: a needless flush costs time, a missing one data.
fn write_cache_is_on(controller: &Controller, admin: &mut AdminQueue) -> bool {
    match admin.execute(controller, AdminCommand::get_volatile_write_cache(), ADMIN_LIMIT) {
        Ok(enabled) => enabled & 1 == 1,
        Err(error) => {
            log::warn!("{}: {error}; taking its write cache to be on", controller.function().name());
            true
        }
    }
}

/// Agrees with the controller on the number of I/O queues; at most `wanted`.
fn negotiate_queues(controller: &Controller, admin: &mut AdminQueue, wanted: usize) -> Result<usize, Cause> {
    let wanted = u16::try_from(wanted).expect("one event per vector");
    let granted = admin.execute(controller, AdminCommand::set_number_of_queues(wanted), ADMIN_LIMIT)?;
    // Submission queues in the low half, completion queues in the high one; both 0's based.
    let granted = (granted & 0xffff).min(granted >> 16) + 1;
    let queues = granted.min(wanted.into());
    if queues < wanted.into() {
        log::info!("{}: grants {granted} of {wanted} queues", controller.function().name());
    }
    Ok(usize::try_from(queues).expect("at most 65536"))
}

struct Wanted {
    id: u16,
    depth: u16,
    namespace: u32,
    limits: Limits,
    sgl: Option<Granularity>,
    event: OwnedFd,
}

fn create_queue(controller: &mut Controller, admin: &mut AdminQueue, wanted: Wanted) -> Result<IoQueue, Cause> {
    let Wanted { id, depth, namespace, limits, sgl, event } = wanted;
    let memory = controller.memory("an I/O queue", memory_needed(depth))?;
    let completions = memory.iova.0 + completions_at(depth) as u64;
    admin.execute(controller, AdminCommand::create_completion_queue(id, depth, completions, id), ADMIN_LIMIT)?;
    admin.execute(controller, AdminCommand::create_submission_queue(id, depth, memory.iova.0), ADMIN_LIMIT)?;
    let name = format!("{} queue {id}", controller.function().name());
    let interrupt_wanted = controller.function().interrupt_wanted(id);
    Ok(IoQueue::new(QueueSetup {
        name,
        id,
        depth,
        memory,
        doorbells: controller.doorbells(),
        namespace,
        limits,
        sgl,
        event,
        interrupt_wanted,
    }))
}
