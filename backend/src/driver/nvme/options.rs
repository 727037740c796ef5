//! What the operator configures.

use std::fmt;
use std::sync::Arc;

use crate::hardware::{Function, InterruptKind};

/// Reacquires a released function once it is available again.
pub type ReacquireFn = Box<dyn FnMut() -> anyhow::Result<Arc<dyn Function>> + Send>;

/// Options of [`Nvme::bring_up`](super::Nvme::bring_up).
#[derive(Clone, Debug)]
pub struct NvmeOptions {
    /// Identifiers of the namespaces to serve, one disk each, all different; empty: the only active one.
    pub namespaces: Vec<u32>,
    /// Wanted number of I/O queues, at least one for each namespace, among which they are divided. Fewer are created if the
    /// function has fewer vectors or the controller grants fewer.
    pub queues: u16,
    /// Report the disk as read-only.
    pub read_only: bool,
    /// Which interrupts to use.
    pub interrupts: InterruptPolicy,
    /// What not to use, because this drive does not do it well.
    pub avoid: Vec<Avoid>,
}

/// What drives are known to do badly, although they report it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Avoid {
    /// Write Zeroes: the guest writes zeroes instead.
    WriteZeroes,
    /// Dataset Management: the guest cannot discard.
    Discard,
    /// Scatter-gather lists: data that PRPs cannot describe is copied.
    Sgl,
    /// More than one interrupt vector: one I/O queue shares it with the admin queue.
    Vectors,
    /// Command identifiers of its own for each queue, and any above the size of a queue: one I/O queue.
    Tags,
}

/// Which interrupts to use. If the function has none of them, its queues are polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InterruptPolicy {
    /// The best that the function has: MSI-X, MSI, INTx, in this order.
    #[default]
    Auto,
    /// This kind only.
    Only(InterruptKind),
    /// None.
    Poll,
}

impl InterruptPolicy {
    /// The kinds to try, in order.
    pub(super) fn kinds(&self) -> &[InterruptKind] {
        match self {
            Self::Auto => &[InterruptKind::MsiX, InterruptKind::Msi, InterruptKind::Intx],
            Self::Only(kind) => std::slice::from_ref(kind),
            Self::Poll => &[],
        }
    }
}

impl fmt::Display for InterruptPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("MSI-X, MSI or INTx"),
            Self::Only(kind) => write!(f, "{kind}"),
            Self::Poll => f.write_str("none wanted"),
        }
    }
}
