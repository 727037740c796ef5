//! The command line. It follows QEMU's conventions for vhost-user programs (docs/interop/vhost-user.rst, "Backend program
//! conventions").

mod choices;
mod command;
mod several_namespaces;

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use rustix::net::SocketAddrUnix;

use crate::engine::WatchdogOptions;
use crate::handover::Terms;
use crate::local_server::LocalAddress;
use crate::placement::CpuList;
use crate::socket::{Access, GroupId, SocketMode, UserId};
use crate::vfio::{NotAnAddress, PciAddress};
pub use choices::{Avoided, Bars, Interrupts, Iommu, NoSnoopPolicy, Rings, SandboxChoice};
pub use command::{Command, CtlCommand};

/// The parsed command line.
#[derive(Clone, Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
#[command(version, about = "Serves a VFIO-owned device to QEMU over vhost-user", max_term_width = 100, after_help = AFTER_HELP)]
pub struct Config {
    /// Show information instead of serving
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Print the capabilities of this program as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// Listen on this UNIX socket (at most 107 bytes); created at start, removed at exit
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Vec<PathBuf>,
    /// Mode of the sockets' files, in octal, such as 0660 [default: 0777 less the umask]
    #[arg(long, value_name = "OCTAL", requires = "socket_path", conflicts_with = "fd")]
    pub socket_mode: Option<SocketMode>,
    /// Group of the sockets' files, whose members may connect with mode 0660 [default: that of this process]
    #[arg(long, value_name = "NAME|GID", requires = "socket_path", conflicts_with = "fd")]
    pub socket_group: Option<GroupId>,
    /// User of the sockets' files, such as libvirt-qemu [default: that of this process]
    #[arg(long, value_name = "NAME|UID", requires = "socket_path", conflicts_with = "fd")]
    pub socket_user: Option<UserId>,
    /// Use this inherited descriptor of a listening or connected UNIX socket
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<RawFd>,
    /// The NVMe function to serve: one bound to vfio-pci, by its address or as an inherited descriptor of its open
    /// /dev/vfio/devices/vfioN (without a number: the one that is named `device`), or one emulated in this process
    #[arg(
        long,
        value_name = "DOMAIN:BUS:DEV.FN|fd[=FDNUM]|emulated[:NAME=VALUE,…]",
        required_unless_present = "print_capabilities"
    )]
    pub device: Option<DeviceArg>,
    /// Serve the whole function over vfio-user (QEMU's vfio-user-pci), instead of a disk over vhost-user
    #[arg(long)]
    pub vfio_user: bool,
    /// How the guest accesses the registers of a whole function
    #[arg(long, value_name = "HOW", value_enum, requires = "vfio_user")]
    pub bars: Option<Bars>,
    /// The namespace to serve [default: the only one]; several, each with a --socket-path, are disks of their own (see below)
    #[arg(long, value_name = "NSID")]
    pub namespace: Vec<u32>,
    /// Serve no other disk than the one with this serial number, NGUID or EUI64 (see ctl identify)
    #[arg(long, value_name = "ID", conflicts_with = "vfio_user")]
    pub expect_disk: Option<String>,
    /// Number of virtqueues of each socket; they are shared among one worker per NVMe queue [default: one per CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: Option<u16>,
    /// Layouts of virtqueues that are offered
    #[arg(long, value_name = "LAYOUTS", value_enum, default_value_t, conflicts_with = "vfio_user")]
    pub rings: Rings,
    /// Refuse all writes of the guest
    #[arg(long)]
    pub read_only: bool,
    /// How the drive tells of finished commands; without such interrupts it is polled while commands are in flight
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub interrupts: Interrupts,
    /// What not to use, because this drive does it badly; several are separated by commas
    #[arg(long, value_name = "WHAT", value_enum, value_delimiter = ',')]
    pub avoid: Vec<Avoided>,
    /// What to do about a device that can bypass the CPU caches
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub no_snoop: NoSnoopPolicy,
    /// The kernel's interface for the device and its memory
    #[arg(long, value_name = "INTERFACE", value_enum, default_value_t)]
    pub iommu: Iommu,
    /// Use this inherited descriptor of an open /dev/iommu
    #[arg(long, value_name = "FDNUM")]
    pub iommu_fd: Option<RawFd>,
    /// Register the device with the shim in the VM's process, which listens on this socket (see README)
    #[arg(long, value_name = "PATH")]
    pub kvm_socket: Option<PathBuf>,
    /// Ask this QMP monitor of QEMU to unplug a whole function when the host wants it back
    #[arg(long, value_name = "PATH", requires = "vfio_user", value_parser = PathBufValueParser::new().try_map(socket_path))]
    pub qmp_socket: Option<PathBuf>,
    /// ID of the function's device in QEMU [default: the vfio-user-pci that uses the socket, or the only one]
    #[arg(long, value_name = "ID", requires = "qmp_socket")]
    pub qmp_device: Option<String>,
    /// Listen for a successor on this UNIX socket, which goes on where this process stops (see README)
    #[arg(long, value_name = "PATH", conflicts_with = "vfio_user")]
    pub handover_socket: Option<PathBuf>,
    /// Go on where the process stops that listens on this socket; its front-end notices nothing
    #[arg(long, value_name = "PATH", conflicts_with = "vfio_user")]
    pub takeover: Option<PathBuf>,
    /// The same, with an inherited connection to it; used by a process that starts its successor on SIGUSR2
    #[arg(long, value_name = "FDNUM", conflicts_with_all = ["vfio_user", "takeover"], hide = true)]
    pub takeover_fd: Option<RawFd>,
    /// Let a front-end of the same user connect while another one is served, and take its place; see ctl successor
    #[arg(long, conflicts_with_all = ["vfio_user", "kvm_socket"])]
    pub successor: bool,
    /// Let an operator see and control this process on this UNIX socket, for this user and root (see ctl)
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Serve metrics for Prometheus on this UNIX socket or loopback port, such as 127.0.0.1:9100
    #[arg(long, value_name = "PATH|ADDR:PORT")]
    pub metrics: Option<LocalAddress>,
    /// What to give up once this process serves: capabilities, files, system calls (see README)
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub sandbox: SandboxChoice,
    /// Measure how long requests take; ctl latency does so at run time
    #[arg(long, conflicts_with = "vfio_user")]
    pub latency: bool,
    /// How long an idle worker polls at most before it sleeps, in microseconds; not at all where that is in vain
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub poll_us: u32,
    /// CPUs of the workers, such as 2-5,8: divided among them if there is one for each, else each runs on all [default: those
    /// of the drive's NUMA node]
    #[arg(long, value_name = "LIST", conflicts_with = "vfio_user")]
    pub cpus: Option<CpuList>,
    /// Time-out after which a command is aborted, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout_ms: u32,
    /// error, warn, info, debug or trace; RUST_LOG overrides it
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,
}

/// `--device`: the function to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    /// A function bound to vfio-pci.
    Pci(PciAddress),
    /// A function whose open file was passed in: its number, or `None` for the one that the service manager names `device`.
    PassedIn(Option<RawFd>),
    /// A function emulated in this process, with the text of its [options](crate::emulated::Options).
    Emulated(String),
}

/// The argument is neither a PCI address, nor a descriptor, nor `emulated`.
#[derive(Debug, thiserror::Error)]
pub enum NotADevice {
    /// It looks like an address.
    #[error("{0}; or fd=FDNUM, or emulated[:NAME=VALUE,…]")]
    Address(NotAnAddress),
    /// It looks like a descriptor.
    #[error("`{0}` is not the number of a descriptor; give fd=FDNUM, such as fd=5")]
    Number(String),
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => write!(f, "{address}"),
            // The number is another one in each process.
            Self::PassedIn(_) => f.write_str("fd"),
            Self::Emulated(options) => write!(f, "emulated:{options}"),
        }
    }
}

impl FromStr for DeviceArg {
    type Err = NotADevice;

    fn from_str(text: &str) -> Result<Self, NotADevice> {
        if let Some(number) = text.strip_prefix("fd=") {
            let wrong = |_| NotADevice::Number(number.to_owned());
            return number.parse::<u16>().map(|number| Self::PassedIn(Some(number.into()))).map_err(wrong);
        }
        match text.split_once(':').unwrap_or((text, "")) {
            ("fd", "") => Ok(Self::PassedIn(None)),
            ("emulated", options) => Ok(Self::Emulated(options.to_owned())),
            _ => text.parse().map(Self::Pci).map_err(NotADevice::Address),
        }
    }
}

/// Refuses what cannot be the path of a UNIX socket.
fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    match SocketAddrUnix::new(&path) {
        Ok(_) => Ok(path),
        Err(errno) => Err(format!("a socket's path has at most 108 bytes: {errno}")),
    }
}

const AFTER_HELP: &str = "\
Without --socket-path and --fd, a socket passed by systemd (LISTEN_FDS) is used. What was passed
with these names (LISTEN_FDNAMES, OpenFile=) is used in place of a path:
  device   an open /dev/vfio/devices/vfioN, with --device fd
  iommu    an open /dev/iommu
  kvm      a second /dev/vfio/devices/vfioN, to tell KVM with --kvm-socket
  control  a listening socket for ctl

Several namespaces of one drive are served at once by
  --namespace A --socket-path PATH-A --namespace B --socket-path PATH-B …
in the same order. Each socket has a front-end of its own, also of another virtual machine, and
its part of the IOMMU's address space. The drive's queues are divided evenly among the sockets;
the first have one more if that leaves some, and each needs at least one.

--device emulated needs no hardware and no privilege: a disk of 1 GiB in memory. Options:
  size=4G  namespaces=N (of that size each)  file=PATH,create=on  lba=512|4096  queues=N
  medium=memory|null  latency=80us  wcache=on|off
  mdts=N  sgl=on|off  serial=TEXT  mode=threaded|inline  no-snoop=never|controllable  snoop-enforced=on|off
  vectors=N (MSI-X)  msi=N  intx=on|off  command-set=N
  and limits and misbehaviours, see backend/src/emulated/traits.rs
  faults=FILE (faults to inject, see backend/src/emulated/faults.toml)

QEMU:
  -object memory-backend-memfd,id=mem,size=4G,share=on -machine memory-backend=mem
  -chardev socket,id=c0,path=PATH,reconnect-ms=1000
  -device vhost-user-blk-pci,chardev=c0,num-queues=N";

impl Config {
    /// Checks what the options together must satisfy.
    ///
    /// # Errors
    /// The problem, to be shown as one of the command line.
    pub fn check(&self) -> Result<(), clap::Error> {
        let problem = several_namespaces::problem(self);
        problem.map_or(Ok(()), |text| Err(Self::command().error(ErrorKind::ArgumentConflict, text)))
    }

    /// What a successor must have in common with this process; `None` without a device.
    #[must_use]
    pub fn terms(&self) -> Option<Terms> {
        let value = self.no_snoop.to_possible_value()?;
        Some(Terms {
            device: self.device.as_ref()?.to_string(),
            queues: self.queue_count(),
            namespace: self.namespace.first().copied(),
            read_only: self.read_only,
            no_snoop: value.get_name().to_owned(),
            kvm_socket: self.kvm_socket.clone(),
        })
    }

    /// Who may connect to the socket that is created.
    #[must_use]
    pub fn socket_access(&self) -> Access {
        Access { mode: self.socket_mode, user: self.socket_user, group: self.socket_group }
    }

    /// How long an idle worker polls at most before it sleeps.
    #[must_use]
    pub fn spin(&self) -> Duration {
        Duration::from_micros(self.poll_us.into())
    }

    /// The time-outs of commands and of the device.
    #[must_use]
    pub fn watchdog(&self) -> WatchdogOptions {
        WatchdogOptions { timeout: Duration::from_millis(self.timeout_ms.into()), ..WatchdogOptions::default() }
    }

    /// Number of virtqueues.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        let cpus = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(64);
        self.queues.unwrap_or_else(|| u16::try_from(cpus()).expect("at most 64"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::VirtioFeatures;

    fn parse(words: &[&str]) -> Result<Config, String> {
        let config =
            Config::try_parse_from(["vhost-device-vfio"].iter().chain(words)).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
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
    fn a_bad_address_is_refused_with_an_example() {
        let error = parse(&["--socket-path", "/run/s", "--device", "nvme0"]).unwrap_err();
        assert!(error.contains("such as 0000:00:04.0; or fd=FDNUM"), "{error}");
    }

    #[test]
    fn a_device_is_an_address_or_emulated() {
        let device = |word: &str| parse(&["--device", word]).unwrap().device.unwrap();
        assert_eq!(device("00:04.0"), DeviceArg::Pci("0000:00:04.0".parse().unwrap()));
        assert_eq!(device("emulated"), DeviceArg::Emulated(String::new()));
        assert_eq!(device("emulated:file=/a:b"), DeviceArg::Emulated("file=/a:b".to_owned()));
        assert!(parse(&["--device", "emulatedx"]).is_err());
        assert_eq!(device("fd"), DeviceArg::PassedIn(None));
        assert_eq!(device("fd=5"), DeviceArg::PassedIn(Some(5)));
        assert_eq!(device("fd=5").to_string(), device("fd").to_string(), "a successor has other numbers");
        for wrong in ["fd=", "fd=-1", "fd=five"] {
            assert!(parse(&["--device", wrong]).unwrap_err().contains("give fd=FDNUM, such as fd=5"), "{wrong}");
        }
    }

    #[test]
    fn a_monitor_is_for_a_whole_function_and_a_device_for_a_monitor() {
        let disk = parse(&["--device", "00:04.0", "--qmp-socket", "/run/q"]).unwrap_err();
        let no_monitor = parse(&["--device", "00:04.0", "--vfio-user", "--qmp-device", "edu"]).unwrap_err();

        assert!(disk.contains("--vfio-user"), "{disk}");
        assert!(no_monitor.contains("--qmp-socket"), "{no_monitor}");
    }

    #[test]
    fn a_monitor_whose_path_cannot_be_one_is_refused() {
        let error = parse(&["--vfio-user", "--device", "00:04.0", "--qmp-socket", &"x".repeat(109)]).unwrap_err();
        assert!(error.contains("a socket's path has at most 108 bytes"), "{error}");
    }

    #[test]
    fn packed_rings_can_be_left_out_of_a_disk() {
        let withheld = |words: &[&str]| parse(&[&["--device", "00:04.0"], words].concat()).map(|c| c.rings.withheld());
        assert_eq!(withheld(&["--rings", "split"]), Ok(VirtioFeatures::RING_PACKED));
        assert_eq!(withheld(&[]), Ok(VirtioFeatures::empty()));
        assert!(withheld(&["--vfio-user", "--rings", "split"]).unwrap_err().contains("cannot be used with"));
    }

    #[test]
    fn zero_queues_are_refused() {
        assert!(parse(&["--device", "00:04.0", "--queues", "0"]).is_err());
        assert_eq!(parse(&["--device", "00:04.0", "--queues", "64"]).unwrap().queue_count(), 64);
    }

    #[test]
    fn only_a_disk_is_handed_over() {
        for option in ["--handover-socket", "--takeover"] {
            let error = parse(&["--device", "00:04.0", "--vfio-user", option, "/run/h"]).unwrap_err();
            assert!(error.contains("cannot be used with"), "{error}");
            assert!(parse(&["--device", "00:04.0", option, "/run/h"]).is_ok());
        }
    }

    #[test]
    fn a_successor_needs_a_disk_and_a_shim_of_its_own_is_named_later() {
        for option in [&["--vfio-user"][..], &["--kvm-socket", "/run/k"]] {
            let words = [&["--device", "00:04.0", "--successor"], option].concat();
            assert!(parse(&words).unwrap_err().contains("cannot be used with"), "{option:?}");
        }
        assert!(parse(&["--device", "00:04.0", "--successor"]).unwrap().successor);
    }

    #[test]
    fn the_terms_of_a_hand_over_are_written_like_the_options() {
        let words = ["--device", "emulated:size=1M", "--queues", "3", "--no-snoop", "allow", "--read-only"];
        let terms = parse(&words).unwrap().terms().unwrap();
        assert_eq!((terms.device.as_str(), terms.queues, terms.no_snoop.as_str()), ("emulated:size=1M", 3, "allow"));
        assert!(terms.read_only);
        assert_eq!(parse(&["--device", "00:04.0"]).unwrap().terms().unwrap().device, "0000:00:04.0");
    }
}
