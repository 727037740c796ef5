//! What the operator configures.

/// Options of [`Nvme::bring_up`](super::Nvme::bring_up).
#[derive(Clone, Debug)]
pub struct NvmeOptions {
    /// Identifier of the namespace to serve; `None`: the only active one.
    pub namespace: Option<u32>,
    /// Wanted number of I/O queues, at least one. Fewer are created if the function has fewer vectors or the controller
    /// grants fewer.
    pub queues: u16,
    /// Report the disk as read-only.
    pub read_only: bool,
}
