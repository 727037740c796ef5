//! Counters of the controller.

/// Counters of commands, data and events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Admin commands completed.
    pub admin: u64,
    /// Read commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Flush commands.
    pub flushes: u64,
    /// I/O commands of other kinds.
    pub others: u64,
    /// I/O commands that ended in an error.
    pub errors: u64,
    /// Bytes of successful reads.
    pub bytes_read: u64,
    /// Bytes of successful writes.
    pub bytes_written: u64,
    /// Passes over an I/O submission queue that found commands. One pass may handle several doorbell writes.
    pub passes: u64,
    /// Vectors signalled.
    pub interrupts: u64,
    /// Doorbell writes with an invalid value, or for a queue that does not exist.
    pub bad_doorbells: u64,
}
