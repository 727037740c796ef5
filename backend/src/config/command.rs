//! The subcommands, which show information instead of serving.

use std::path::PathBuf;

use clap::Subcommand;

use super::{Iommu, NoSnoopPolicy};
use crate::vfio::PciAddress;

/// The subcommands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the facts about a function's DMA and the CPU caches, their sources, and the verdicts
    Inspect {
        /// The function
        #[arg(value_name = "DOMAIN:BUS:DEV.FN")]
        address: PciAddress,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Show the verdicts with this policy
        #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
        no_snoop: NoSnoopPolicy,
        /// The kernel's interface for the device
        #[arg(long, value_name = "INTERFACE", value_enum, default_value_t)]
        iommu: Iommu,
        /// Query the shim in a VM's process as well: what KVM knows, and whether a device can still be registered
        #[arg(long, value_name = "PATH")]
        kvm_socket: Option<PathBuf>,
    },
    /// Show every function behind an IOMMU
    List {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Go through what a first run needs, and say how to get what is missing; fails if something is
    Doctor {
        /// The function that is to be served
        #[arg(value_name = "DOMAIN:BUS:DEV.FN")]
        address: Option<PciAddress>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Describe functions to container runtimes: print a file for /etc/cdi
    Cdi {
        /// The functions, which are bound to vfio-pci
        #[arg(value_name = "DOMAIN:BUS:DEV.FN", required = true)]
        addresses: Vec<PciAddress>,
        /// The kernel's interface for the devices
        #[arg(long, value_name = "INTERFACE", value_enum, default_value_t)]
        iommu: Iommu,
    },
    /// Ask a running program for something, on its control socket
    Ctl {
        /// Its socket, as given to --control
        #[arg(long, value_name = "PATH", default_value = "/run/vhost-device-vfio/control")]
        socket: PathBuf,
        /// Print the result as one JSON object
        #[arg(long)]
        json: bool,
        /// What to ask
        #[command(subcommand)]
        command: CtlCommand,
    },
}

/// The subcommands of `ctl`.
#[derive(Clone, Debug, Subcommand)]
pub enum CtlCommand {
    /// Show what the device does, again each second
    Top,
    /// One request and its result.
    #[command(flatten)]
    Ask(crate::control::Command),
}
