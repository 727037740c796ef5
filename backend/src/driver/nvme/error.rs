//! What can go wrong between a PCI function and a working namespace.

use std::io;
use std::time::Duration;

use super::regs::ControllerStatus;
use super::status::Status;
use crate::hardware::MapError;

/// Which function, and what about it.
#[derive(Debug, thiserror::Error)]
#[error("{function}: {cause}")]
pub struct NvmeError {
    /// Name of the function, such as `0000:00:04.0`.
    pub function: String,
    /// What went wrong.
    pub cause: Cause,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The function is something else.
    #[error(
        "is not an NVMe controller but {what} (PCI class code {class:06x}, wanted 010802); give --device the address of an NVMe function"
    )]
    NotNvme {
        /// The class code: base class, subclass, programming interface.
        class: u32,
        /// The class in words.
        what: &'static str,
    },
    /// The kernel refused something about the function.
    #[error("{what}: {source}")]
    Function {
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// Queue memory could not be had.
    #[error("memory for {what}: {source}")]
    Memory {
        /// What it was for.
        what: &'static str,
        /// Why not.
        source: MapError,
    },
    /// Registers read as all ones.
    #[error("does not answer (its registers read as all ones): removed, powered down, or its memory space disabled")]
    Gone,
    /// It has been stopped, and has not come back.
    #[error("is stopped")]
    Stopped,
    /// The host has it, or nobody: it was given back.
    #[error("is away: {0:#}")]
    Away(
        /// Why it cannot be taken again.
        anyhow::Error,
    ),
    /// CSTS.CFS is set.
    #[error("has stopped with a fatal error ({0})")]
    Fatal(
        /// CSTS at that time.
        String,
    ),
    /// CSTS did not come to say what it should.
    #[error("no {condition} within {limit:?} ({status})")]
    NotReached {
        /// What was waited for.
        condition: &'static str,
        /// How long.
        limit: Duration,
        /// CSTS at the end.
        status: String,
    },
    /// The controller cannot do what this driver needs.
    #[error("{property} is {found}, but {wanted} is needed")]
    Unsuitable {
        /// Which property.
        property: &'static str,
        /// Its value.
        found: String,
        /// What this driver needs.
        wanted: &'static str,
    },
    /// No completion of an admin command.
    #[error("no answer to {command} within {limit:?}")]
    NoAnswer {
        /// Which command.
        command: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// An admin command failed.
    #[error("{command} failed: {status}")]
    Command {
        /// Which command.
        command: &'static str,
        /// How.
        status: Status,
    },
    /// The wanted namespace does not exist or is not attached to this controller.
    #[error("has no active namespace {wanted}; it has: {existing}")]
    NoNamespace {
        /// The namespace asked for.
        wanted: u32,
        /// Those that exist, for the message.
        existing: String,
    },
    /// None was asked for, and there is more than one.
    #[error("has several namespaces: {existing}; choose one with --namespace")]
    SeveralNamespaces {
        /// Those that exist, for the message.
        existing: String,
    },
    /// There is no active namespace at all.
    #[error("has no active namespace; create and attach one (nvme create-ns, nvme attach-ns)")]
    Empty,
    /// The namespace's blocks cannot be served.
    #[error(
        "namespace {namespace} has blocks of {data} data and {metadata} metadata bytes; 512 or 4096 without metadata can be served (nvme format --lbaf=…)"
    )]
    BlockFormat {
        /// Which namespace.
        namespace: u32,
        /// Data bytes per block, as a number or a power of two.
        data: String,
        /// Metadata bytes per block.
        metadata: u16,
    },
    /// The disk is another than the one that the guest has.
    #[error("is no longer what it was: {0}")]
    Changed(
        /// What is different.
        String,
    ),
}

impl Cause {
    /// For `map_err` on calls to the function.
    pub(super) fn function(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Function { what, source }
    }

    pub(super) fn fatal(status: ControllerStatus) -> Self {
        Self::Fatal(format!("{status:?}"))
    }
}
