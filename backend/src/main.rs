//! The program: parses the command line and combines a source of the function, a service and a socket.

mod program;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;

use program::operator::Doors;
use program::origin::DeviceSpec;
use program::vfio_source::PassedFiles;
use program::{Signals, block, confined, limits, logging, placement, several, takeover, whole};
use vhost_device_vfio::cdi::Description;
use vhost_device_vfio::config::{Command, Config, CtlCommand};
use vhost_device_vfio::control;
use vhost_device_vfio::doctor::Diagnosis;
use vhost_device_vfio::emulated::EmulatedError;
use vhost_device_vfio::inspect::{Report, list, list_json};
use vhost_device_vfio::service_manager::Passed;
use vhost_device_vfio::socket::Listen;
use vhost_device_vfio::sys::signal_fd;
use vhost_device_vfio::vhost_user::capabilities;

/// Exit status for an invalid command line, the same as clap's.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let config = Config::parse();
    config.check().unwrap_or_else(|error| error.exit());
    if config.print_capabilities {
        println!("{}", capabilities());
        return ExitCode::SUCCESS;
    }
    logging::start(config.log_level, config.socket_path.len() > 1);
    if let Some(command) = &config.command {
        return execute(command);
    }
    match run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "vhost-device-vfio: {error:#}");
            if error.is::<EmulatedError>() { USAGE.into() } else { ExitCode::FAILURE }
        }
    }
}

fn run(config: &Config) -> Result<()> {
    // Before any thread is started, so that all threads inherit the blocked signals.
    let stop = signal_fd(&[libc::SIGTERM, libc::SIGINT]).context("catch SIGTERM and SIGINT")?;
    let upgrade = signal_fd(&[libc::SIGUSR2]).context("catch SIGUSR2")?;
    let signals = Signals { stop, upgrade };
    limits::raise_open_files();
    placement::check(config)?;
    confined::prepare(config)?;
    if let Some(link) = takeover::link(config)? {
        return takeover::serve(config, link, signals);
    }
    let passed = Passed::take().context("take what the service manager has stored")?;
    let listens = listens(config, passed.as_ref())?;
    let Some(device) = &config.device else { bail!("no device; give --device DOMAIN:BUS:DEVICE.FUNCTION") };
    let spec = DeviceSpec::new(device)?;
    // Before the device is opened or a backing file is created: a wrong path must not cost a controller reset.
    let access = config.socket_access();
    let open = |listen: Listen| listen.open_for(&access);
    let mut endpoints = listens.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let doors = Doors::open(config, passed.as_ref())?;
    let files = PassedFiles::take(config, passed.as_ref())?;
    let source = spec.open(config.iommu.into(), files)?;
    if endpoints.len() > 1 {
        let stored = passed.and_then(|passed| passed.stored);
        return several::serve(config, &source, endpoints, stored, &signals);
    }
    let endpoint = endpoints.pop().context("no socket")?;
    log::info!("{endpoint}");
    if config.vfio_user {
        whole::serve(config, &source, endpoint, doors, &signals.stop)
    } else {
        let stored = passed.and_then(|passed| passed.stored);
        block::serve(config, &source, (endpoint, doors), stored, signals)
    }
}

/// The sockets to serve: paths, a descriptor, or the one passed by systemd.
fn listens(config: &Config, passed: Option<&Passed>) -> Result<Vec<Listen>> {
    match (&*config.socket_path, config.fd) {
        ([_, ..], _) => Ok(config.socket_path.iter().cloned().map(Listen::Path).collect()),
        ([], Some(number)) => Ok(vec![Listen::inherited(number)?]),
        ([], None) => {
            let none = || anyhow!("no socket; give --socket-path or --fd, or start it by a systemd socket unit");
            let passed = passed.ok_or_else(none)?;
            Ok(vec![Listen::activated(&passed.sockets, &passed.count)?])
        }
    }
}

fn execute(command: &Command) -> ExitCode {
    match command {
        Command::Ctl { socket, json, command } => {
            let asked = match command {
                CtlCommand::Top => None,
                CtlCommand::Ask(command) => Some(command),
            };
            if let Err(error) = control::run(socket, asked, *json) {
                let _ = writeln!(std::io::stderr(), "vhost-device-vfio: {error}");
                return ExitCode::FAILURE;
            }
        }
        Command::Cdi { addresses, iommu } => match Description::new(addresses, (*iommu).into()) {
            Ok(description) => println!("{}", description.json()),
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "vhost-device-vfio: {error}");
                return ExitCode::FAILURE;
            }
        },
        Command::List { json: true } => println!("{}", list_json(&list())),
        Command::List { json: false } => list().iter().for_each(|line| println!("{line}")),
        Command::Doctor { address, json } => {
            let diagnosis = Diagnosis::new(*address);
            if *json {
                println!("{}", diagnosis.json())
            } else {
                print!("{diagnosis}")
            }
            if !diagnosis.passed() {
                return ExitCode::FAILURE;
            }
        }
        Command::Inspect { address, json, no_snoop, iommu, kvm_socket } => {
            let report = Report::new(*address, (*iommu).into(), (*no_snoop).into(), kvm_socket.as_deref());
            if *json { println!("{}", report.json()) } else { print!("{report}") }
        }
    }
    ExitCode::SUCCESS
}
