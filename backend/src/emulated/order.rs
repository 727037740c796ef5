//! The order in which I/O commands complete. NVMe gives commands none (NVM Command Set 1.0 §2.1.2), and a drive that is busy
//! completes them in another order than it fetched them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The order in which I/O commands complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Each command takes [`Options::latency`](super::Options::latency), so the first one fetched is the first one completed.
    Fetched,
    /// Each command takes a random time below twice that latency.
    Random {
        /// The same seed gives the same sequence of times.
        seed: u64,
    },
}

/// The time that each I/O command takes.
pub(super) struct Latency {
    mean: Duration,
    order: Order,
    /// State of the random numbers.
    state: AtomicU64,
}

/// The increment of SplitMix64 (Steele, Lea and Flood 2014, figure 17).
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl Latency {
    pub(super) fn new(mean: Duration, order: Order) -> Self {
        let seed = if let Order::Random { seed } = order { seed } else { 0 };
        Self { mean, order, state: AtomicU64::new(seed) }
    }

    /// The time that the next command takes.
    #[inline]
    pub(super) fn next(&self) -> Duration {
        if self.order == Order::Fetched { self.mean } else { self.random() }
    }

    fn random(&self) -> Duration {
        let state = self.state.fetch_add(GAMMA, Relaxed).wrapping_add(GAMMA);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let below = 2 * self.mean.as_nanos();
        let scaled = (u128::from(mixed ^ mixed >> 31) * below) >> 64;
        Duration::from_nanos(u64::try_from(scaled).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEAN: Duration = Duration::from_micros(100);

    fn times(order: Order) -> Vec<Duration> {
        let latency = Latency::new(MEAN, order);
        (0..1000).map(|_| latency.next()).collect()
    }

    #[test]
    fn random_times_are_below_twice_the_latency_and_have_it_as_their_mean() {
        let times = times(Order::Random { seed: 1 });

        assert!(times.iter().all(|time| *time < 2 * MEAN));
        let mean = times.iter().sum::<Duration>() / 1000;
        assert!((95..105).contains(&mean.as_micros()), "{mean:?}");
    }

    #[test]
    fn a_seed_determines_all_times() {
        assert_eq!(times(Order::Random { seed: 7 }), times(Order::Random { seed: 7 }));
        assert_ne!(times(Order::Random { seed: 7 }), times(Order::Random { seed: 8 }));
    }

    #[test]
    fn commands_in_the_order_of_their_fetch_all_take_the_same_time() {
        assert!(times(Order::Fetched).iter().all(|time| *time == MEAN));
    }
}
