//! The commands, as they are written in a request and on the command line.

use std::path::PathBuf;

use clap::Subcommand;
use serde::{Deserialize, Serialize};

/// Version of the protocol; see the top of `control/mod.rs`.
pub const VERSION: u32 = 1;

/// Time that requests in flight have to complete unless the operator says otherwise, milliseconds.
const DRAIN_MS: u32 = 5000;

/// See the table at the top of `control/mod.rs`.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Who is served, and whether the device works
    Status {},
    /// Counters by worker and virtqueue, and how long requests take if that is measured
    Stats {},
    /// Whether DMA is coherent, and the facts that decide it
    Verdict {},
    /// What is mapped for the device, and what the front-end shares
    Memory {},
    /// Change the log level until the process ends
    LogLevel {
        /// error, warn, info, debug, trace or off
        level: log::LevelFilter,
    },
    /// Measure how long requests take, or no longer
    Latency {
        /// true or false
        #[arg(action = clap::ArgAction::Set)]
        on: bool,
    },
    /// Let requests wait in their rings once those in flight are complete; the guest waits until `resume`
    Drain {
        /// Time that requests in flight have to complete, in milliseconds
        #[arg(long, default_value_t = DRAIN_MS)]
        #[serde(default = "default_drain")]
        timeout_ms: u32,
    },
    /// Take requests again
    Resume {},
    /// Reset the device; requests in flight are submitted again
    ResetDevice {},
    /// The device's model, serial number and namespace
    Identify {},
    /// The device's health
    Smart {},
    /// Start the installed program as successor, as SIGUSR2 does
    Takeover {},
    /// Let the next front-end of the same user connect while this one is served, and take its place: a VM changes its QEMU
    Successor {
        /// Where the KVM shim of that VM listens; required with --kvm-socket
        #[arg(long, value_name = "PATH")]
        #[serde(default)]
        kvm_socket: Option<PathBuf>,
        /// No longer
        #[arg(long)]
        #[serde(default)]
        off: bool,
    },
}

fn default_drain() -> u32 {
    DRAIN_MS
}
