//! Serves a whole PCI function over vfio-user.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use vhost_device_vfio::board::Board;
use vhost_device_vfio::coherency::decide;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::control::{Personality, Subject};
use vhost_device_vfio::passthrough::Passthrough;
use vhost_device_vfio::qmp::Monitor;
use vhost_device_vfio::sandbox::{self, Role};
use vhost_device_vfio::service_manager::{self, Heartbeat};
use vhost_device_vfio::socket::Endpoint;
use vhost_device_vfio::vfio_user::{EndReason, Server};
use vhost_device_vfio::vhost_user::Succession;

use super::operator::{Doors, hooks, report_front_ends};
use super::origin::DeviceSource;

/// Serves the function until `stop` is readable or the host wants it back.
///
/// # Errors
/// Why it cannot be served, or can no longer be served.
pub(crate) fn serve(
    config: &Config,
    source: &DeviceSource,
    endpoint: Endpoint,
    doors: Doors,
    stop: &OwnedFd,
) -> Result<()> {
    if config.read_only {
        bail!("--read-only: the guest's own driver drives a whole function; this program sees none of its commands");
    }
    let (owned, reacquire) = source.acquire_whole(config.no_snoop.into(), config.kvm_socket.is_some())?;
    let (name, facts) = (owned.function.name().to_owned(), owned.facts);
    let vmm = owned.vmm(config, &name);
    let space = Arc::clone(&owned.space);
    let bars = config.bars.unwrap_or_default().into();
    let mut device = Passthrough::new(owned.function, owned.space, bars, facts, owned.file.is_some())?;
    if let Some(reacquire) = reacquire {
        device = device.with_reacquire(reacquire);
    }

    let mut server = Server::new(endpoint, device, vmm);
    if let Some(path) = &config.qmp_socket {
        server = server.with_monitor(Monitor::new(path.clone(), config.qmp_device.clone()));
    }
    let board = Arc::<Board>::default();
    server.post_on(&board);
    server.beat(Heartbeat::wanted(false).context("watchdog of the service manager")?);
    report_front_ends(&board, &name, decide(&facts).word());
    let named = (Personality::VfioUser, name.clone());
    let subject =
        Arc::new(Subject::new(named, facts, board, space, None, hooks(Personality::VfioUser, &Succession::default())));
    let operator = doors.serve(&subject)?;
    log::info!("serving {name}, the whole function, over vfio-user");
    sandbox::enter(Role::Control);
    service_manager::ready();
    let ended = server.run(stop);
    service_manager::stopping();
    operator.close();
    let (space, verdict) = (server.device().space().statistics(), decide(&facts).word());
    log::info!("statistics: {space} verdict={verdict} {}", server.vmm().registrations());
    if ended? == EndReason::HostWantsFunction {
        log::warn!("{name}: given back to the host; start this program again to serve it");
    }
    Ok(())
}
