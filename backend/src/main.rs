//! The program: takes the function, brings it up, listens, serves, and shuts down in the reverse order.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Parser;

use vhost_device_vfio::coherency::{Personality, Policy, decide};
use vhost_device_vfio::config::{Config, Question};
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions};
use vhost_device_vfio::engine::{Engine, Options, Watch};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::inspect::{Report, list};
use vhost_device_vfio::iommu::LiveSpace;
use vhost_device_vfio::sys::signal_fd;
use vhost_device_vfio::take::Taken;
use vhost_device_vfio::vfio::PciAddress;
use vhost_device_vfio::vhost_user::{Device, Listen, Server, capabilities};

/// How long commands in flight may take when a ring stops or memory goes away, before the device is reset.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let config = Config::parse();
    if config.print_capabilities {
        println!("{}", capabilities());
        return ExitCode::SUCCESS;
    }
    env_logger::Builder::new().filter_level(config.log_level).parse_default_env().init();
    if let Some(question) = &config.question {
        answer(question);
        return ExitCode::SUCCESS;
    }
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "vhost-device-vfio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn answer(question: &Question) {
    match question {
        Question::List => list().iter().for_each(|line| println!("{line}")),
        Question::Inspect { address, json: true, no_snoop } => {
            println!("{}", Report::new(*address, (*no_snoop).into()).json())
        }
        Question::Inspect { address, json: false, no_snoop } => print!("{}", Report::new(*address, (*no_snoop).into())),
    }
}

fn run(config: &Config) -> Result<()> {
    // Before any thread is started, so that all of them have the signals blocked.
    let stop = signal_fd(&[libc::SIGTERM, libc::SIGINT]).context("catch SIGTERM and SIGINT")?;
    // Before the device is touched: a mistake in the path should not cost a controller reset.
    let entrance = listen(config)?.open()?;
    let address = config.device.ok_or_else(|| anyhow!("no device; give --device DOMAIN:BUS:DEVICE.FUNCTION"))?;
    let (function, space) = take(address, config.no_snoop.into())?;

    let queues = config.queue_count();
    let options = NvmeOptions { namespace: config.namespace, queues, read_only: config.read_only };
    let dma: Arc<dyn AddressSpace> = Arc::new(space.clone());
    let nvme = Nvme::bring_up(function, Arc::clone(&dma), options)?;
    let options =
        Options { rings: usize::from(queues), spin: config.spin(), patience: PATIENCE, watch: Watch::default() };
    let engine = Engine::start(Box::new(nvme), &dma, options)?;

    let mut server = Server::new(entrance, Device { engine, space: dma, queues })?;
    log::info!("serving {address} on {queues} virtqueues");
    let served = server.run(stop);
    let device = server.into_device();
    log::info!("statistics: {} maps={}", device.engine.statistics(), space.maps());
    device.engine.shut_down();
    Ok(served?)
}

/// The socket the user asked for: a path, a descriptor, or what systemd passed.
fn listen(config: &Config) -> Result<Listen> {
    match (&config.socket_path, config.fd) {
        (Some(path), _) => Ok(Listen::Path(path.clone())),
        (None, Some(number)) => Ok(Listen::inherited(number)?),
        (None, None) => Listen::activated()?
            .ok_or_else(|| anyhow!("no socket; give --socket-path or --fd, or start it by a systemd socket unit")),
    }
}

/// Takes the function, says what is known about the caches and what follows, and obeys.
fn take(address: PciAddress, policy: Policy) -> Result<(Arc<dyn Function>, LiveSpace)> {
    let taken = Taken::take(address)?;
    let facts = taken.evidence().facts(Personality::Mediated, policy, false);
    log::info!("{address}: {}; {}", taken.evidence().snoop, facts.no_snoop);
    log::info!("{address}: DMA is {}", decide(&facts));
    if !facts.snoop_enforced {
        log::warn!(
            "{address}: this IOMMU does not enforce snooping; a device that uses PCI No Snoop could go behind the CPU caches"
        );
    }
    let (function, space) = taken.settle(&facts)?;
    Ok((Arc::new(function), space))
}
