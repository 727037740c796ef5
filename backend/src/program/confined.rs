//! The sandbox of this program: what can be named after the start, from the command line.

use std::path::PathBuf;

use anyhow::{Context, Result};

use vhost_device_vfio::config::{Config, DeviceArg, SandboxChoice};
use vhost_device_vfio::helper;
use vhost_device_vfio::local_server::LocalAddress;
use vhost_device_vfio::sandbox::{self, Mode, Paths};

/// What sysfs says of a function and of its group. It is there anew when a drive has come back, so its directory cannot be named.
const SYSFS: [&str; 3] = ["/sys/devices", "/sys/bus/pci", "/sys/kernel/iommu_groups"];

/// Starts the helper and prepares the roles of the threads, unless `--sandbox off` was given. To be called before any thread is
/// started, any file is opened, and any memory is locked.
///
/// # Errors
/// The helper cannot be started, or the kernel lacks what `--sandbox strict` requires.
pub(crate) fn prepare(config: &Config) -> Result<()> {
    let mode = match config.sandbox {
        SandboxChoice::Auto => Mode::Auto,
        SandboxChoice::Strict => Mode::Strict,
        SandboxChoice::Off => return Ok(()),
    };
    let address = match config.device {
        Some(DeviceArg::Pci(address)) => Some(address),
        _ => None,
    };
    helper::start(address).context("start the helper process; --sandbox off serves without it")?;
    let locks = !matches!(config.device, Some(DeviceArg::Emulated(_)));
    sandbox::prepare(mode, &paths(config), locks).context("--sandbox")
}

fn paths(config: &Config) -> Paths {
    let mut paths = Paths { readable: vec![PathBuf::from("/proc")], ..Paths::default() };
    if matches!(config.device, Some(DeviceArg::Pci(_))) {
        paths.readable.extend(SYSFS.map(PathBuf::from));
    }
    let metrics = match &config.metrics {
        Some(LocalAddress::Path(path)) => Some(path),
        Some(LocalAddress::Port(address)) => {
            paths.ports.push(address.port());
            None
        }
        None => None,
    };
    let sockets = [&config.control, &config.handover_socket, &config.takeover].into_iter().flatten().chain(metrics);
    sockets.chain(&config.socket_path).for_each(|path| paths.add_socket(path));
    paths
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn paths_of(words: &str) -> Paths {
        paths(&Config::parse_from(std::iter::once("vhost-device-vfio").chain(words.split(' '))))
    }

    #[test]
    fn what_the_command_line_names_can_be_named_and_nothing_else() {
        let found = paths_of("--device emulated --socket-path /run/s/a --control /run/c/b --metrics 127.0.0.1:9100");
        assert_eq!(found.sockets, ["/run/c", "/run/s"].map(PathBuf::from));
        assert_eq!((found.readable, found.ports), (vec![PathBuf::from("/proc")], vec![9100]));
    }

    #[test]
    fn sysfs_is_for_a_function_that_is_opened_by_its_path() {
        assert!(paths_of("--device 00:04.0").readable.contains(&PathBuf::from("/sys/devices")));
        assert_eq!(paths_of("--device fd=3").readable, [PathBuf::from("/proc")]);
    }
}
