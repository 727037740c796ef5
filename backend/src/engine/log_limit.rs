//! A guest can fail a million requests a second; the log gets a few lines of it, and the number of those left out.

use std::time::{Duration, Instant};

/// A bucket of log lines that fills up again slowly.
pub(super) struct LogLimit {
    lines: u32,
    refilled: Instant,
    suppressed: u64,
}

impl LogLimit {
    const BURST: u32 = 10;
    const REFILL: Duration = Duration::from_secs(10);

    pub(super) fn new() -> Self {
        Self { lines: Self::BURST, refilled: Instant::now(), suppressed: 0 }
    }

    /// The number of lines left out before, if one may be written now.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.refilled) >= Self::REFILL {
            self.lines = Self::BURST;
            self.refilled = now;
        }
        match self.lines.checked_sub(1) {
            Some(left) => {
                self.lines = left;
                Some(std::mem::take(&mut self.suppressed))
            }
            None => {
                self.suppressed += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = LogLimit::new();
        let now = limit.refilled;

        let admitted = (0..100).filter(|_| limit.admit(now).is_some()).count();

        assert_eq!(admitted, 10);
        assert_eq!(limit.admit(now + LogLimit::REFILL), Some(90));
        assert_eq!(limit.admit(now + LogLimit::REFILL), Some(0));
    }
}
