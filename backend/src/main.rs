//! The program answers three questions, and only here are the answers put together: how the function is obtained and its
//! memory mapped, what is done with it, and who asks for it.

mod program;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;

use program::origin::Plan;
use program::{block, whole};
use vhost_device_vfio::config::{Config, Question};
use vhost_device_vfio::emulated::EmulatedError;
use vhost_device_vfio::inspect::{Report, list, list_json};
use vhost_device_vfio::socket::Listen;
use vhost_device_vfio::sys::signal_fd;
use vhost_device_vfio::vhost_user::capabilities;

/// Exit status for a command line that cannot be obeyed, as clap has it.
const USAGE: u8 = 2;

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

fn run(config: &Config) -> Result<()> {
    // Before any thread is started, so that all of them have the signals blocked.
    let stop = signal_fd(&[libc::SIGTERM, libc::SIGINT]).context("catch SIGTERM and SIGINT")?;
    let listen = listen(config)?;
    let Some(device) = &config.device else { bail!("no device; give --device DOMAIN:BUS:DEVICE.FUNCTION") };
    let plan = Plan::new(device)?;
    // Before a real device is touched, or a file made: a mistake in the path should not cost a controller reset.
    let endpoint = listen.open()?;
    let origin = plan.open()?;
    log::info!("{endpoint}");
    if config.vfio_user {
        whole::serve(config, &origin, endpoint, &stop)
    } else {
        block::serve(config, &origin, endpoint, stop)
    }
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

fn answer(question: &Question) {
    match question {
        Question::List { json: true } => println!("{}", list_json(&list())),
        Question::List { json: false } => list().iter().for_each(|line| println!("{line}")),
        Question::Inspect { address, json, no_snoop, kvm_socket } => {
            let report = Report::new(*address, (*no_snoop).into(), kvm_socket.as_deref());
            if *json { println!("{}", report.json()) } else { print!("{report}") }
        }
    }
}
