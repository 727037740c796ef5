//! Serves an NVMe drive as a virtio disk over vhost-user.

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

use super::origin::DeviceSource;

/// Time-out for commands in flight when a ring is stopped or memory is removed. The device is reset after it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves the drive until `stop` is readable.
///
/// # Errors
/// Why it cannot be served, or can no longer be served.
pub(crate) fn serve(config: &Config, source: &DeviceSource, endpoint: Endpoint, stop: OwnedFd) -> Result<()> {
    let (owned, reacquire) = source.acquire_for_driver(config.no_snoop.into())?;
    let (space, facts) = (Arc::clone(&owned.space), owned.facts);
    let name = owned.function.name().to_owned();
    let vmm = owned.vmm(config, &name);

    let queues = config.queue_count();
    let (read_only, interrupts) = (config.read_only, config.interrupts.into());
    let options = NvmeOptions {
        namespace: config.namespace,
        queues,
        read_only,
        interrupts,
        avoid: config.avoid.iter().map(|&what| what.into()).collect(),
    };
    let mut nvme = Nvme::bring_up(owned.function, Arc::clone(&space), options)?;
    // Not with a shim: KVM would have to be told of the new device file before any memory is mapped.
    if let (Some(reacquire), None) = (reacquire, &config.kvm_socket) {
        nvme = nvme.with_reacquire(reacquire);
    }
    let options = Options {
        rings: usize::from(queues),
        spin: config.spin(),
        drain_timeout: DRAIN_TIMEOUT,
        watch: config.watchdog(),
    };
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
