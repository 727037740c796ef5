//! Counters of one session, for the log.

use std::fmt;

/// See the top of this file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) messages: u64,
    pub(super) config_accesses: u64,
    pub(super) region_reads: u64,
    pub(super) region_writes: u64,
    pub(super) resets: u64,
    pub(super) refused: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { messages, config_accesses, region_reads, region_writes, resets, refused } = self;
        write!(f, "messages={messages} config_accesses={config_accesses} region_reads={region_reads} ")?;
        write!(f, "region_writes={region_writes} resets={resets} refused={refused}")
    }
}
