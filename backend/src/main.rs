//! The program: takes the function, brings it up, listens, serves, and shuts down in the reverse order.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Parser;

use vhost_device_vfio::coherency::{CacheOps, Coherent, Facts, Personality, Policy, Verdict, decide};
use vhost_device_vfio::config::Config;
use vhost_device_vfio::driver::Driver;
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions};
use vhost_device_vfio::engine::{Engine, Options};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::iommu::{LiveSpace, PageTable};
use vhost_device_vfio::sys::{CacheLines, Instruction, inherit, signal_fd};
use vhost_device_vfio::vfio::{Opened, PciAddress, no_snoop, open_iommufd};
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
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "vhost-device-vfio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> Result<()> {
    // Before any thread is started, so that all of them have the signals blocked.
    let stop = signal_fd(&[libc::SIGTERM, libc::SIGINT]).context("catch SIGTERM and SIGINT")?;
    let listen = listen(config)?;
    let address = config.device.ok_or_else(|| anyhow!("no device; give --device DOMAIN:BUS:DEVICE.FUNCTION"))?;
    let (function, space) = take(address)?;

    let queues = config.queue_count();
    let options = NvmeOptions { namespace: config.namespace, queues, read_only: config.read_only };
    let dma: Arc<dyn AddressSpace> = Arc::new(space.clone());
    let nvme = Nvme::bring_up(function, Arc::clone(&dma), options)?;
    let disk = nvme.geometry();
    log::info!("{address}: {} {}, {} blocks of {} bytes", disk.model, disk.serial, disk.blocks, disk.block_size);
    let options = Options { rings: usize::from(queues), spin: config.spin(), patience: PATIENCE };
    let engine = Engine::start(Box::new(nvme), &dma, options)?;

    let mut server = Server::new(listen, Device { engine, space: dma, queues })?;
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
        (None, Some(number)) => {
            let fd =
                inherit(number).with_context(|| format!("--fd {number}: not a descriptor passed to this process"))?;
            Ok(Listen::Fd(fd))
        }
        (None, None) => Listen::activated()?
            .ok_or_else(|| anyhow!("no socket; give --socket-path or --fd, or start it by a systemd socket unit")),
    }
}

/// Takes the function, decides about its caches, and gives it an address space to match.
fn take(address: PciAddress) -> Result<(Arc<dyn Function>, LiveSpace)> {
    let iommufd = Arc::new(open_iommufd(Path::new("/dev/iommu"))?);
    let ioas = iommufd.ioas().context("allocate an address space on /dev/iommu")?;
    let bound = Opened::open(address)?.bind(&iommufd, &ioas)?;
    let table =
        PageTable::new(iommufd, ioas, bound.device_id()).with_context(|| format!("{address}: make a page table"))?;
    let table = Arc::new(table);
    let function = bound.attach(Arc::clone(&table))?;
    let space = coherent_space(address, &function, table)?;
    Ok((Arc::new(function), space))
}

fn coherent_space(address: PciAddress, function: &dyn Function, table: Arc<PageTable>) -> Result<LiveSpace> {
    let lines = CacheLines::detect();
    let facts = Facts {
        snoop_enforced: table.snoop().enforced,
        no_snoop: no_snoop::probe(function, address.is_virtual_function()).context("try the No Snoop bit")?,
        policy: Policy::default(),
        personality: Personality::Mediated,
        cache_ops: lines.map_or(CacheOps::None, cache_ops),
        shim: false,
    };
    let verdict = decide(&facts);
    log::info!(
        "{address}: {}; snooping enforced: {}; No Snoop: {:?}",
        table.snoop().hardware,
        facts.snoop_enforced,
        facts.no_snoop
    );
    log::info!("{address}: DMA is {verdict}");
    if !facts.snoop_enforced {
        log::warn!(
            "{address}: this IOMMU does not enforce snooping, so a device that sets PCI No Snoop could go behind the CPU caches"
        );
    }
    match verdict {
        Verdict::Coherent(Coherent::HeldOff { .. }) if !no_snoop::hold_off(function)? => {
            Err(anyhow!("{address}: its Enable No Snoop bit does not stay clear"))
        }
        Verdict::Coherent(_) => Ok(LiveSpace::coherent(table)),
        Verdict::Flush(_) => {
            let lines = lines.ok_or_else(|| anyhow!("no cache-line operations"))?;
            LiveSpace::flushing(table, lines).with_context(|| format!("{address}: make a staging page table"))
        }
        Verdict::Refuse(refusal) => Err(anyhow!("{address}: {refusal}")),
    }
}

fn cache_ops(lines: CacheLines) -> CacheOps {
    match lines.instruction() {
        Instruction::ClflushOpt => CacheOps::ClflushOpt,
        Instruction::Clflush => CacheOps::Clflush,
        Instruction::DcCivac => CacheOps::DcCivac,
    }
}
