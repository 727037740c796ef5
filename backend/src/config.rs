//! The command line, in the words QEMU's own vhost-user programs use (docs/interop/vhost-user.rst, "Backend program
//! conventions").

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};

use crate::coherency::Policy;
use crate::engine::WatchdogOptions;
use crate::passthrough::BarAccess;
use crate::vfio::{NotAnAddress, PciAddress};

/// What the user asked for.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
#[command(version, about = "Serves a VFIO-owned device to QEMU over vhost-user", max_term_width = 100, after_help = AFTER_HELP)]
pub struct Config {
    /// Ask instead of serve
    #[command(subcommand)]
    pub question: Option<Question>,
    /// Print what this program can do as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// Listen on this UNIX socket (at most 107 bytes); created now, removed at exit
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Use this inherited descriptor, a listening or a connected UNIX socket
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<RawFd>,
    /// The NVMe function to serve: one bound to vfio-pci, or one emulated in this process
    #[arg(
        long,
        value_name = "DOMAIN:BUS:DEV.FN|emulated[:NAME=VALUE,…]",
        required_unless_present = "print_capabilities"
    )]
    pub device: Option<DeviceArg>,
    /// Serve the whole function over vfio-user (QEMU's vfio-user-pci), instead of a disk over vhost-user
    #[arg(long)]
    pub vfio_user: bool,
    /// How the guest reaches the registers of a whole function
    #[arg(long, value_name = "HOW", value_enum, requires = "vfio_user")]
    pub bars: Option<Bars>,
    /// The namespace to serve [default: the only one]
    #[arg(long, value_name = "NSID")]
    pub namespace: Option<u32>,
    /// Virtqueues to offer; each pair of CPU and NVMe queue serves its share [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: Option<u16>,
    /// Refuse writes, whatever the guest tries
    #[arg(long)]
    pub read_only: bool,
    /// What to do about a device that could go behind the CPU caches
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub no_snoop: NoSnoopPolicy,
    /// Tell the VM's process of the device, through the shim that listens at this socket there (see README)
    #[arg(long, value_name = "PATH")]
    pub kvm_socket: Option<PathBuf>,
    /// How long a worker polls for more work before it sleeps, in microseconds
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub poll_us: u32,
    /// How long a command may take before it is aborted, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout_ms: u32,
    /// error, warn, info, debug or trace; RUST_LOG is heard as well
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,
}

/// `--device`: which function is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// One bound to vfio-pci.
    Pci(PciAddress),
    /// One in this process; the text says what it is made of, see [`emulated::Options`](crate::emulated::Options).
    Emulated(String),
}

/// Not a device.
#[derive(Debug, thiserror::Error)]
#[error("{0}; or emulated[:NAME=VALUE,…]")]
pub struct NotADevice(NotAnAddress);

impl FromStr for DeviceArg {
    type Err = NotADevice;

    fn from_str(text: &str) -> Result<Self, NotADevice> {
        match text.split_once(':').unwrap_or((text, "")) {
            ("emulated", options) => Ok(Self::Emulated(options.to_owned())),
            _ => text.parse().map(Self::Pci).map_err(NotADevice),
        }
    }
}

/// What can be asked instead of served.
#[derive(Clone, Debug, Subcommand)]
pub enum Question {
    /// Show what is known about a function's caches, where it is known from, and what follows
    Inspect {
        /// The function
        #[arg(value_name = "DOMAIN:BUS:DEV.FN")]
        address: PciAddress,
        /// As one JSON object
        #[arg(long)]
        json: bool,
        /// As it would be served with this policy
        #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
        no_snoop: NoSnoopPolicy,
        /// Ask the shim in a VM's process, too: what KVM knows, and whether a device can still be registered
        #[arg(long, value_name = "PATH")]
        kvm_socket: Option<PathBuf>,
    },
    /// Show every function behind an IOMMU
    List {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// `--bars`: how the guest reaches the registers of a whole function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Bars {
    /// By mapping them: the VMM is given a descriptor of the device
    #[default]
    Direct,
    /// By messages: the VMM is given nothing
    Trapped,
}

impl From<Bars> for BarAccess {
    fn from(bars: Bars) -> Self {
        match bars {
            Bars::Direct => Self::Direct,
            Bars::Trapped => Self::Trapped,
        }
    }
}

/// `--no-snoop`: what to do about a device that could go behind the CPU caches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NoSnoopPolicy {
    /// Hold its Enable No Snoop bit off where that is possible, else flush
    #[default]
    Suppress,
    /// Let it, and flush
    Allow,
    /// Serve only what is coherent by itself
    Refuse,
    /// Take it that the device goes behind the caches, whatever its bit says, and flush
    Assume,
}

impl From<NoSnoopPolicy> for Policy {
    fn from(policy: NoSnoopPolicy) -> Self {
        match policy {
            NoSnoopPolicy::Suppress => Self::Suppress,
            NoSnoopPolicy::Allow => Self::Allow,
            NoSnoopPolicy::Refuse => Self::Refuse,
            NoSnoopPolicy::Assume => Self::Assume,
        }
    }
}

const AFTER_HELP: &str = "\
Without --socket-path and --fd, a socket passed by systemd (LISTEN_FDS) is used.

--device emulated needs no hardware and no privilege: a disk of 1 GiB in memory. Further:
  size=4G  file=PATH,create=on  lba=512|4096  queues=N  medium=memory|null  latency=80us  wcache=on|off
  mdts=N  sgl=on|off  serial=TEXT  mode=threaded|inline  no-snoop=never|controllable  snoop-enforced=on|off
  faults=FILE (a list of what goes wrong: backend/src/emulated/faults.toml)

QEMU:
  -object memory-backend-memfd,id=mem,size=4G,share=on -machine memory-backend=mem
  -chardev socket,id=c0,path=PATH,reconnect-ms=1000
  -device vhost-user-blk-pci,chardev=c0,num-queues=N";

impl Config {
    /// How long a worker polls before it sleeps.
    #[must_use]
    pub fn spin(&self) -> Duration {
        Duration::from_micros(self.poll_us.into())
    }

    /// When commands are late, and the device is.
    #[must_use]
    pub fn watch(&self) -> WatchdogOptions {
        WatchdogOptions { timeout: Duration::from_millis(self.timeout_ms.into()), ..WatchdogOptions::default() }
    }

    /// How many virtqueues to offer.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
        self.queues.unwrap_or_else(|| u16::try_from(cpus()).expect("at most 64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Config, String> {
        Config::try_parse_from(["vhost-device-vfio"].iter().chain(words)).map_err(|error| error.to_string())
    }

    #[test]
    fn capabilities_need_no_device() {
        assert!(parse(&["--print-capabilities"]).unwrap().print_capabilities);
    }

    #[test]
    fn a_path_and_a_descriptor_exclude_each_other() {
        let error = parse(&["--socket-path", "/run/s", "--fd", "3", "--device", "00:04.0"]).unwrap_err();
        assert!(error.contains("cannot be used with"), "{error}");
    }

    #[test]
    fn a_wrong_address_is_answered_with_an_example() {
        let error = parse(&["--socket-path", "/run/s", "--device", "nvme0"]).unwrap_err();
        assert!(error.contains("such as 0000:00:04.0; or emulated"), "{error}");
    }

    #[test]
    fn a_device_is_an_address_or_emulated() {
        let device = |word: &str| parse(&["--device", word]).unwrap().device.unwrap();
        assert_eq!(device("00:04.0"), DeviceArg::Pci("0000:00:04.0".parse().unwrap()));
        assert_eq!(device("emulated"), DeviceArg::Emulated(String::new()));
        assert_eq!(device("emulated:file=/a:b"), DeviceArg::Emulated("file=/a:b".to_owned()));
        assert!(parse(&["--device", "emulatedx"]).is_err());
    }

    #[test]
    fn zero_queues_are_refused() {
        assert!(parse(&["--device", "00:04.0", "--queues", "0"]).is_err());
        assert_eq!(parse(&["--device", "00:04.0", "--queues", "64"]).unwrap().queue_count(), 64);
    }
}
