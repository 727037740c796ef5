//! Goes on where another process of this program stops. Until the session is taken, everything belongs to that process: on any
//! error this one ends at once, and nothing that it was given is dropped.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use vhost_device_vfio::acquire::hand_over::TakeOver;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::handover::{Description, Incoming, Link, ListenerState, Restored, apply};
use vhost_device_vfio::hardware::Function;
use vhost_device_vfio::service_manager::{FdStore, Stored};
use vhost_device_vfio::socket::Endpoint;
use vhost_device_vfio::sys::inherit;
use vhost_device_vfio::vhost_user::{HandOver, Inheritance, SettleFn, monotonic_ns};

use super::block::{Disk, applicants};
use super::movable::take;
use super::origin::{Acquired, DeviceSpec};
use super::{OwnedFunction, Signals};

/// The connection to the running process, if this one is to take over.
///
/// # Errors
/// Nobody listens there, or the descriptor is no such connection.
pub(crate) fn link(config: &Config) -> Result<Option<Link>> {
    if let Some(path) = &config.takeover {
        let link = Link::connect(path).with_context(|| format!("--takeover {}: connect", path.display()))?;
        return Ok(Some(link));
    }
    let Some(number) = config.takeover_fd else { return Ok(None) };
    let failed = || format!("--takeover-fd {number}");
    Ok(Some(Link::adopt(inherited(number).with_context(failed)?).with_context(failed)?))
}

/// An inherited descriptor. Standard input is replaced by /dev/null, so that no other file gets its number.
fn inherited(number: i32) -> std::io::Result<OwnedFd> {
    if number != 0 {
        return inherit(number);
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(socket)
}

/// What is kept until the session is taken or refused.
struct Attempt {
    /// Held so that no error drops, and thereby detaches, the function.
    function: Option<Arc<dyn Function>>,
    restored: Option<Restored>,
}

impl Attempt {
    /// Tells the predecessor, and ends.
    fn give_up(&mut self, error: &anyhow::Error) -> ! {
        if let Some(restored) = self.restored.take() {
            restored.fail(&format!("{error:#}"));
        }
        log::error!("take over: {error:#}");
        // The function is not dropped.
        std::process::exit(1);
    }
}

/// Takes over from the process at the other end of `link`, and serves.
///
/// # Errors
/// The running process refuses, or the drive can no longer be served.
pub(crate) fn serve(config: &Config, link: Link, signals: Signals) -> Result<()> {
    let spec = DeviceSpec::new(config.device.as_ref().context("no device")?)?;
    let offered = apply(link, config.terms().context("no device")?)?;
    let (description, descriptors, restored) = offered.split();
    let attempt = Rc::new(RefCell::new(Attempt { function: None, restored: Some(restored) }));
    match prepare(config, spec, description, descriptors, signals.upgrade, &attempt) {
        Ok((disk, inheritance)) => disk.run(signals.stop, Some(inheritance)),
        Err(error) => attempt.borrow_mut().give_up(&error),
    }
}

/// Restores everything but the front-end's session, which the server restores.
fn prepare(
    config: &Config,
    spec: DeviceSpec,
    description: Description,
    mut descriptors: Incoming,
    upgrade: OwnedFd,
    attempt: &Rc<RefCell<Attempt>>,
) -> Result<(Disk, Inheritance)> {
    let Description { paused_at, device, listener, successors, stored, front_end, .. } = description;
    let start = Instant::now();
    let (acquired, take_over) =
        take((spec, config.iommu.into()), device.function, &mut descriptors, config.no_snoop.into())?;
    let Acquired { owned, reacquire, movable } = acquired;
    let OwnedFunction { function, .. } = &owned;
    attempt.borrow_mut().function = Some(Arc::clone(function));
    let endpoint = match (listener, &front_end) {
        (Some(listener), _) => listening(listener, &mut descriptors)?,
        (None, Some(front_end)) => Endpoint::connected(descriptors.duplicate(front_end.connection)?.into()),
        (None, None) => bail!("the description has neither a listening socket nor a front-end"),
    };
    let mut disk = Disk::bring_up(config, owned, reacquire, endpoint, Some(&device.disk))?;
    let controller_ms = start.elapsed().as_millis();
    check_geometry(&disk, device.blocks, device.read_only)?;
    let mut applicants = applicants(config, upgrade)?;
    listen(config, &mut applicants, successors, &mut descriptors)?;
    disk.server.allow_hand_over(HandOver { applicants, function: movable });
    let (operator, subject, config_of_doors) = (disk.operator.clone(), Arc::clone(&disk.subject), config.clone());
    let taken = Box::new(move || operator.succeed(&config_of_doors, &subject));
    let settle = settle(Rc::clone(attempt), take_over, (paused_at, controller_ms), taken);
    let write_cache = Some(device.write_cache);
    let terms = config.terms().context("no device")?;
    let open_store = Box::new(move || FdStore::open(terms, Some(&Stored::of_predecessor(&stored))));
    Ok((disk, Inheritance { front_end, write_cache, crashed: false, descriptors, settle, open_store }))
}

fn listening(state: ListenerState, descriptors: &mut Incoming) -> Result<Endpoint> {
    Ok(Endpoint::inherit(descriptors.take(state.socket)?, state.name, state.file)?)
}

/// Listens for the next successor: with the predecessor's socket if it is at the same path.
fn listen(
    config: &Config,
    applicants: &mut vhost_device_vfio::handover::Applicants,
    state: Option<ListenerState>,
    descriptors: &mut Incoming,
) -> Result<()> {
    let Some(path) = &config.handover_socket else { return Ok(()) };
    let failed = || format!("--handover-socket {}", path.display());
    if let Some(state) = state
        && applicants.inherit(path, state, descriptors).with_context(failed)?
    {
        return Ok(());
    }
    applicants.listen(path).with_context(failed)
}

/// What the driver does not check: the guest keeps the size that it knows, or is told of another.
fn check_geometry(disk: &Disk, blocks: u64, read_only: bool) -> Result<()> {
    let now = disk.server.device().engine.geometry();
    ensure!(now.read_only == read_only, "the disk is {} now", if now.read_only { "read-only" } else { "writable" });
    if now.blocks != blocks {
        log::warn!("the disk has {} blocks now, {blocks} before", now.blocks);
        disk.server.config_notifier().config_changed();
    }
    Ok(())
}

/// Takes the session once everything is restored, or ends this process.
fn settle(
    attempt: Rc<RefCell<Attempt>>,
    take_over: Option<TakeOver>,
    (paused_at, controller_ms): (u64, u128),
    taken: Box<dyn FnOnce()>,
) -> SettleFn {
    Box::new(move |restored| {
        let mut attempt = attempt.borrow_mut();
        let ready = take_over.as_ref().map_or(Ok(()), TakeOver::ready).map_err(anyhow::Error::from);
        if let Err(error) = restored.map_err(|error| anyhow::Error::msg(error.to_string())).and(ready) {
            attempt.give_up(&error);
        }
        if let Some(restored) = attempt.restored.take()
            && let Err(error) = restored.take()
        {
            attempt.give_up(&error.into());
        }
        // From here on everything is this process's.
        attempt.function = None;
        if let Some(Err(error)) = take_over.map(TakeOver::complete) {
            log::error!("complete the take-over of the address space: {error}");
        }
        taken();
        let ms = monotonic_ns().saturating_sub(paused_at) / 1_000_000;
        log::info!("taken over; requests waited {ms} ms, of which the controller took {controller_ms} ms");
    })
}
