//! An NVMe drive as a virtio disk: the block engine over vhost-user.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use vhost_device_vfio::coherency::decide;
use vhost_device_vfio::config::Config;
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions};
use vhost_device_vfio::engine::{Engine, Options};
use vhost_device_vfio::socket::Endpoint;
use vhost_device_vfio::vhost_user::{Device, Server};

use super::origin::Origin;

/// How long commands in flight may take when a ring stops or memory goes away, before the device is reset.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the drive until `stop` is readable.
///
/// # Errors
/// Why it could not be served, or not any longer.
pub(crate) fn serve(config: &Config, origin: &Origin, endpoint: Endpoint, stop: OwnedFd) -> Result<()> {
    let (obtained, reacquire) = origin.for_driver(config.no_snoop.into())?;
    let (space, facts) = (Arc::clone(&obtained.space), obtained.facts);
    let name = obtained.function.name().to_owned();
    let vmm = obtained.vmm(config, &name);

    let queues = config.queue_count();
    let options = NvmeOptions { namespace: config.namespace, queues, read_only: config.read_only };
    let mut nvme = Nvme::bring_up(obtained.function, Arc::clone(&space), options)?;
    // With a shim, KVM would have to be told of the new file before anything is mapped for it.
    if let (Some(reacquire), None) = (reacquire, &config.kvm_socket) {
        nvme = nvme.with_reacquire(reacquire);
    }
    let options =
        Options { rings: usize::from(queues), spin: config.spin(), patience: PATIENCE, watch: config.watch() };
    let engine = Engine::start(Box::new(nvme), &space, options)?;

    let kib = space.statistics().mapped / 1024;
    let mut server = Server::new(endpoint, Device { engine, space, queues, vmm })?;
    server.notify_config_changes();
    log::info!("serving {name} on {queues} virtqueues; {kib} KiB mapped");
    let served = server.run(stop);
    let Device { engine, space, vmm, .. } = server.into_device();
    let verdict = decide(&facts).word();
    log::info!("statistics: {} {} verdict={verdict} {}", engine.statistics(), space.statistics(), vmm.registrations());
    engine.shut_down();
    Ok(served?)
}
