//! What an I/O queue pair is made of.

use super::{Doorbells, Granularity, Limits, QueueInterrupt, QueueMemory, Tags};

/// Parameters of [`IoQueue::new`](super::IoQueue::new).
pub struct QueueSetup {
    /// Name in the log, such as `0000:00:04.0 queue 1`.
    pub name: String,
    /// Queue identifier of both rings, at least 1.
    pub id: u16,
    /// Entries in each ring: 2 to [`MAX_DEPTH`](super::MAX_DEPTH).
    pub depth: u16,
    /// Zeroed memory, [`memory_needed`](super::memory_needed) bytes.
    pub memory: QueueMemory,
    /// The controller's doorbells.
    pub doorbells: Doorbells,
    /// Namespace identifier of all commands.
    pub namespace: u32,
    /// The number of its disk.
    pub disk: usize,
    /// Limits of one command.
    pub limits: Limits,
    /// Granularity of SGLs; `None` if the controller does not support them.
    pub sgl: Option<Granularity>,
    /// The completion queue's interrupt.
    pub interrupt: QueueInterrupt,
    /// Whose the command identifiers are.
    pub tags: Tags,
}
