//! A token bucket: it starts full, gives one token at a time and refills at a steady rate.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Budget {
    tokens: u32,
    size: u32,
    refill: Duration,
    filled: Instant,
}

impl Budget {
    /// Holds up to `size` tokens and gains one every `refill`.
    pub(crate) fn new(size: u32, refill: Duration, now: Instant) -> Self {
        Self { tokens: size, size, refill, filled: now }
    }

    /// Takes a token; false if none is left.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled);
        let earned = u32::try_from(passed.as_nanos() / self.refill.as_nanos()).unwrap_or(u32::MAX);
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(self.size);
            self.filled = now;
        }
        let left = self.tokens.checked_sub(1);
        self.tokens = left.unwrap_or(0);
        left.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_served_then_a_steady_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(3, Duration::from_millis(100), start);
        let served = (0..10).filter(|_| budget.take(start)).count();
        assert_eq!(served, 3);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..10).filter(|_| budget.take(later)).count(), 2);
        let much_later = start + Duration::from_secs(1000);
        assert_eq!((0..10).filter(|_| budget.take(much_later)).count(), 3, "never more than its size");
    }
}
