//! The program: takes the function, brings it up, listens, serves, and shuts down in the reverse order.

use std::fmt::Display;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;

use vhost_device_vfio::acquire::AcquiredFunction;
use vhost_device_vfio::coherency::{Facts, Personality, Policy, Verdict, decide};
use vhost_device_vfio::config::{Config, DeviceArg, Question};
use vhost_device_vfio::driver::nvme::{Nvme, NvmeOptions, Source};
use vhost_device_vfio::emulated::{EmulatedError, Machine};
use vhost_device_vfio::engine::{Engine, Options};
use vhost_device_vfio::hardware::{AddressSpace, Function};
use vhost_device_vfio::inspect::{Report, list};
use vhost_device_vfio::iommu::LiveSpace;
use vhost_device_vfio::kvm::{Shim, Vmm};
use vhost_device_vfio::passthrough::Passthrough;
use vhost_device_vfio::socket::{Endpoint, Listen};
use vhost_device_vfio::sys::signal_fd;
use vhost_device_vfio::vfio::PciAddress;
use vhost_device_vfio::vfio::no_snoop;
use vhost_device_vfio::vfio_user::{self, Ended};
use vhost_device_vfio::vhost_user::{Device, Server, capabilities};
use vhost_device_vfio::whole_function::WholeFunction;

/// How long commands in flight may take when a ring stops or memory goes away, before the device is reset.
const PATIENCE: Duration = Duration::from_secs(5);
/// Exit status for a command line that cannot be obeyed, as clap has it.
const USAGE: u8 = 2;

/// A function ready for its driver, and the address space it lives in.
struct Hardware {
    function: Arc<dyn Function>,
    /// Where it is to be had again after the host has asked for it back.
    source: Option<Source>,
    space: Arc<dyn AddressSpace>,
    /// What the decision about the caches rests on.
    facts: Facts,
    /// The device's own file; none if it is emulated.
    file: Option<PathBuf>,
}

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
            if error.is::<EmulatedError>() { USAGE.into() } else { ExitCode::FAILURE }
        }
    }
}

fn answer(question: &Question) {
    match question {
        Question::List => list().iter().for_each(|line| println!("{line}")),
        Question::Inspect { address, json, no_snoop, kvm_socket } => {
            let report = Report::new(*address, (*no_snoop).into(), kvm_socket.as_deref());
            if *json { println!("{}", report.json()) } else { print!("{report}") }
        }
    }
}

fn run(config: &Config) -> Result<()> {
    // Before any thread is started, so that all of them have the signals blocked.
    let stop = signal_fd(&[libc::SIGTERM, libc::SIGINT]).context("catch SIGTERM and SIGINT")?;
    let listen = listen(config)?;
    let Some(device) = &config.device else { bail!("no device; give --device DOMAIN:BUS:DEVICE.FUNCTION") };
    let options = match device {
        DeviceArg::Pci(_) => None,
        DeviceArg::Emulated(options) => Some(options.parse()?),
    };
    // Before a real device is touched, or a file made: a mistake in the path should not cost a controller reset.
    let endpoint = listen.open()?;
    let machine = options.map(Machine::new).transpose()?;
    log::info!("{endpoint}");
    if config.vfio_user {
        return pass_through(config, device, machine, endpoint, &stop);
    }
    let Hardware { function, source, space, facts, file } = match (device, machine) {
        (_, Some(machine)) => emulate(&machine, config.no_snoop.into())?,
        (DeviceArg::Pci(address), None) => acquire(*address, config.no_snoop.into())?,
        (DeviceArg::Emulated(_), None) => unreachable!("made above"),
    };
    let name = function.name().to_owned();

    let queues = config.queue_count();
    let options = NvmeOptions { namespace: config.namespace, queues, read_only: config.read_only };
    let mut nvme = Nvme::bring_up(function, Arc::clone(&space), options)?;
    // With a shim, KVM would have to be told of the new file before anything is mapped for it.
    if let (Some(source), None) = (source, &config.kvm_socket) {
        nvme = nvme.returning(source);
    }
    let options =
        Options { rings: usize::from(queues), spin: config.spin(), patience: PATIENCE, watch: config.watch() };
    let engine = Engine::start(Box::new(nvme), &space, options)?;

    let kib = space.statistics().mapped / 1024;
    let vmm = config
        .kvm_socket
        .clone()
        .map_or_else(Vmm::without_shim, |socket| Vmm::with_shim(Shim { socket, device: name.clone(), facts, file }));
    let mut server = Server::new(endpoint, Device { engine, space, queues, vmm })?;
    server.tell_changes();
    log::info!("serving {name} on {queues} virtqueues; {kib} KiB mapped");
    let served = server.run(stop);
    let Device { engine, space, vmm, .. } = server.into_device();
    let verdict = decide(&facts).word();
    log::info!("statistics: {} {} verdict={verdict} {}", engine.statistics(), space.statistics(), vmm.registrations());
    engine.shut_down();
    Ok(served?)
}

/// Serves the whole function over vfio-user.
fn pass_through(
    config: &Config,
    device: &DeviceArg,
    machine: Option<Machine>,
    endpoint: Endpoint,
    stop: &OwnedFd,
) -> Result<()> {
    if config.read_only {
        bail!(
            "--read-only: the guest's own driver drives a whole function, and this program sees none of its commands"
        );
    }
    let policy = config.no_snoop.into();
    let shim = config.kvm_socket.is_some();
    let (function, space, facts, file): (Arc<dyn WholeFunction>, Arc<dyn AddressSpace>, _, _) = match (device, &machine)
    {
        (_, Some(machine)) => {
            // No KVM is told of a function in this process, and none need be.
            let facts = Facts { personality: Personality::WholeFunction, shim: true, ..machine.facts(policy)? };
            announce(&"emulated", &"software IOMMU", &facts);
            let space = match decide(&facts) {
                Verdict::Coherent(_) => machine.space(),
                Verdict::Flush(_) => machine.staged_space(),
                Verdict::Refuse(refusal) => bail!("emulated: {refusal}"),
            };
            (machine.whole_function(), space, facts, None)
        }
        (DeviceArg::Pci(address), None) => {
            let acquired = AcquiredFunction::acquire(*address)?;
            let facts = acquired.evidence().facts(Personality::WholeFunction, policy, shim);
            announce(address, &acquired.evidence().snoop, &facts);
            let (function, space) = acquired.into_address_space(&facts)?;
            (Arc::new(function), Arc::new(space), facts, address.cdev())
        }
        (DeviceArg::Emulated(_), None) => unreachable!("made by the caller"),
    };
    let name = function.name().to_owned();
    let passthrough = Passthrough::new(function, space, config.bars.unwrap_or_default().into(), facts, file.is_some())?;
    let vmm = config
        .kvm_socket
        .clone()
        .map_or_else(Vmm::without_shim, |socket| Vmm::with_shim(Shim { socket, device: name.clone(), facts, file }));
    let server = vfio_user::Server::new(endpoint, passthrough, vmm);
    log::info!("serving {name}, the whole function, over vfio-user");
    let ended = server.run(stop);
    let (space, verdict) = (server.device().space().statistics(), decide(&facts).word());
    log::info!("statistics: {space} verdict={verdict} {}", server.vmm().registrations());
    match ended? {
        Ended::HostWantsFunction => log::warn!("{name}: given back to the host; start this program again to serve it"),
        Ended::Stopped | Ended::FrontEndLeft => {}
    }
    Ok(())
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
fn acquire(address: PciAddress, policy: Policy) -> Result<Hardware> {
    let acquired = AcquiredFunction::acquire(address)?;
    let facts = acquired.evidence().facts(Personality::Mediated, policy, false);
    announce(&address, &acquired.evidence().snoop, &facts);
    let (function, space) = acquired.into_address_space(&facts)?;
    let kept = space.clone();
    let function = apply_verdict(Arc::new(function), decide(&facts))?;
    let source: Source = Box::new(move || reacquire(address, &kept, &facts));
    Ok(Hardware { function, source: Some(source), space: Arc::new(space), facts, file: address.cdev() })
}

/// Takes a function that the host has had meanwhile. What was decided about the caches must still be right.
fn reacquire(address: PciAddress, space: &LiveSpace, before: &Facts) -> Result<Arc<dyn Function>> {
    let acquired = AcquiredFunction::reacquire(address, space)?;
    let facts = acquired.evidence().facts(before.personality, before.policy, before.shim);
    let (was, verdict) = (decide(before), decide(&facts));
    if verdict != was {
        bail!("{address}: its DMA was {was} and would now be {verdict}; restart this program to serve it");
    }
    let function: Arc<dyn Function> = Arc::new(acquired.into_former_address_space(space)?);
    apply_verdict(Arc::clone(&function), verdict).inspect_err(|_| space.release())
}

/// The same for a function made here.
fn emulate(machine: &Machine, policy: Policy) -> Result<Hardware> {
    let facts = machine.facts(policy)?;
    announce(&"emulated", &"software IOMMU", &facts);
    let verdict = decide(&facts);
    let space = match verdict {
        Verdict::Coherent(_) => machine.space(),
        Verdict::Flush(_) => machine.staged_space(),
        Verdict::Refuse(refusal) => bail!("emulated: {refusal}"),
    };
    let function = apply_verdict(machine.function(), verdict)?;
    Ok(Hardware { function, source: None, space, facts, file: None })
}

/// Holds the Enable No Snoop bit off if that is the verdict.
fn apply_verdict(function: Arc<dyn Function>, verdict: Verdict) -> Result<Arc<dyn Function>> {
    let name = function.name().to_owned();
    no_snoop::apply(function, verdict).with_context(|| format!("{name}: clear the Enable No Snoop bit"))
}

/// Says what the decision rests on and how it comes out.
fn announce(name: &dyn Display, snoop: &dyn Display, facts: &Facts) {
    log::info!("{name}: {snoop}; {}", facts.no_snoop);
    log::info!("{name}: DMA is {}", decide(facts));
    if !facts.snoop_enforced {
        log::warn!(
            "{name}: this IOMMU does not enforce snooping; a device that uses PCI No Snoop could go behind the CPU caches"
        );
    }
}
