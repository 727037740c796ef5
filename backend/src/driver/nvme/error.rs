//! Errors of the NVMe driver.

use std::io;
use std::time::Duration;

use super::regs::ControllerStatus;
use super::status::Status;
use crate::hardware::MapError;

/// An error of one function.
#[derive(Debug, thiserror::Error)]
#[error("{function}: {kind}")]
pub struct NvmeError {
    /// Name of the function, such as `0000:00:04.0`.
    pub function: String,
    /// The error itself.
    pub kind: NvmeErrorKind,
}

/// The kinds of errors of the NVMe driver.
#[derive(Debug, thiserror::Error)]
pub enum NvmeErrorKind {
    /// The function is not an NVMe I/O controller.
    #[error(
        "is not an NVMe controller but {what} (PCI class code {class:06x}, wanted 010802); give --device the address of an NVMe function"
    )]
    NotNvme {
        /// The class code: base class, subclass, programming interface.
        class: u32,
        /// Description of the class.
        what: &'static str,
    },
    /// A system call on the function failed.
    #[error("{what}: {source}")]
    Function {
        /// The step that failed.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// Queue memory could not be allocated or mapped.
    #[error("memory for {what}: {source}")]
    Memory {
        /// Purpose of the memory.
        what: &'static str,
        /// Reason.
        source: MapError,
    },
    /// The registers read as all ones.
    #[error("does not answer (its registers read as all ones): removed, powered down, or its memory space disabled")]
    Gone,
    /// The controller is stopped and has not been recovered.
    #[error("is stopped")]
    Stopped,
    /// The function was released to the host.
    #[error("is released to the host and cannot be reacquired: {0:#}")]
    Released(
        /// Why it cannot be reacquired.
        anyhow::Error,
    ),
    /// CSTS.CFS is set.
    #[error("has stopped with a fatal error ({0})")]
    Fatal(
        /// CSTS at that time.
        String,
    ),
    /// CSTS did not reach an expected state in time.
    #[error("no {condition} within {limit:?} ({status})")]
    StatusTimeout {
        /// The expected state.
        condition: &'static str,
        /// The time-out.
        limit: Duration,
        /// CSTS at the time-out.
        status: String,
    },
    /// The controller lacks something that this driver requires.
    #[error("{property} is {found}, but {wanted} is needed")]
    Unsuitable {
        /// Name of the property.
        property: &'static str,
        /// Its value.
        found: String,
        /// The value that this driver requires.
        wanted: &'static str,
    },
    /// An admin command did not complete in time.
    #[error("no answer to {command} within {limit:?}")]
    CommandTimeout {
        /// Name of the command.
        command: &'static str,
        /// The time-out.
        limit: Duration,
    },
    /// An admin command completed with an error status.
    #[error("{command} failed: {status}")]
    CommandFailed {
        /// Name of the command.
        command: &'static str,
        /// The status.
        status: Status,
    },
    /// The requested namespace does not exist or is not attached to this controller.
    #[error("has no active namespace {wanted}; it has: {existing}")]
    NamespaceNotFound {
        /// Identifier of the requested namespace.
        wanted: u32,
        /// The active namespaces, formatted.
        existing: String,
    },
    /// No namespace was requested, and more than one is active.
    #[error("has several namespaces: {existing}; choose one with --namespace")]
    SeveralNamespaces {
        /// The active namespaces, formatted.
        existing: String,
    },
    /// No namespace is active.
    #[error("has no active namespace; create and attach one (nvme create-ns, nvme attach-ns)")]
    NoActiveNamespace,
    /// The namespace is of a command set without blocks.
    #[error(
        "namespace {namespace} is {what} (CSI {set:02x}h) and cannot be served as a disk: it has no blocks; choose another with --namespace, or give the guest the whole function with --vfio-user"
    )]
    CommandSet {
        /// Namespace identifier.
        namespace: u32,
        /// Command Set Identifier.
        set: u8,
        /// Name of that command set.
        what: &'static str,
    },
    /// The controller does not reach the namespace.
    #[error("the path to namespace {namespace} is {state} (Asymmetric Namespace Access); {fix}")]
    Path {
        /// Namespace identifier.
        namespace: u32,
        /// The state.
        state: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// The logical block format of the namespace is not supported.
    #[error(
        "namespace {namespace} has blocks of {data} data and {metadata} metadata bytes; 512 or 4096 can be served, with metadata only in a buffer of their own and without protection information (nvme format --lbaf=… --ms=0 --pi=0)"
    )]
    BlockFormat {
        /// Namespace identifier.
        namespace: u32,
        /// Data bytes per block, as a number or a power of two.
        data: String,
        /// Metadata bytes per block.
        metadata: u16,
    },
    /// Fewer I/O queues can be created than namespaces are to be served.
    #[error(
        "can have {queues} I/O queues, but {namespaces} namespaces need one each: the limit is the number of interrupt vectors, the \
         controller's number of queues, or --avoid; serve fewer namespaces, or try --interrupts poll"
    )]
    TooFewQueues {
        /// I/O queues.
        queues: usize,
        /// Namespaces.
        namespaces: usize,
    },
    /// After a reset the disk is not the one that the guest has.
    #[error("is no longer what it was: {0}")]
    Changed(
        /// The difference.
        String,
    ),
}

impl NvmeErrorKind {
    /// For `map_err` on calls to the function.
    pub(super) fn function(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Function { what, source }
    }

    pub(super) fn fatal(status: ControllerStatus) -> Self {
        Self::Fatal(format!("{status:?}"))
    }
}
