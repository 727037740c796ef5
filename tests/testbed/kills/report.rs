//! What a run has seen.

use std::fmt;
use std::time::Duration;

/// A run without anything wrong.
#[derive(Debug, Default)]
pub struct Report {
    /// How often the program was killed.
    pub kills: u32,
    /// Requests that completed as they must.
    pub completions: u64,
    /// Requests that completed in a later life than the one they were submitted in.
    pub resubmitted: u64,
    /// Time from the start of the program to the first completion, of each life that got so far.
    pub first: Vec<Duration>,
    /// The program's own memory at the end of each life, KiB.
    pub memory: Vec<u64>,
}

/// The smallest value, the median and the largest.
fn spread<T: Copy + Ord + Default>(values: &[T]) -> [T; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    [at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1))]
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = spread(&self.first).map(|time| time.as_micros());
        let memory = spread(&self.memory);
        write!(
            f,
            "kills={} completions={} resubmitted={} lost=0 doubled=0 reordered=0 first_completion_us={}/{}/{} \
             memory_kib={}/{}/{}",
            self.kills,
            self.completions,
            self.resubmitted,
            first[0],
            first[1],
            first[2],
            memory[0],
            memory[1],
            memory[2]
        )
    }
}
