//! How long requests take, by operation: a histogram that one worker writes and others read. It is measured only on request,
//! because the clock costs more than a worker's whole share of a short request.
//!
//! A request is timed from the pass of its worker that takes it to the pass that completes it. The buckets are 16 to each power of
//! two, so a quantile is at most 6.25 % too high.

use std::time::{Duration, Instant};

use super::counter::Counter;
use super::request::Operation;

/// Buckets for each power of two, as a power of two.
const SUB_BITS: u32 = 4;
const SUB: u64 = 1 << SUB_BITS;
/// Times from here on count as this, ns: about 18 minutes.
const LONGEST: u64 = (1 << 40) - 1;
const BUCKETS: usize = bucket(LONGEST) + 1;

/// The operations that have a histogram each, in this order.
pub const OPERATIONS: [&str; 8] =
    ["read", "write", "flush", "discard", "write_zeroes", "zone_append", "zone_report", "zone_manage"];

/// The bucket of a time in ns. Times below 16 have one each.
#[expect(clippy::cast_possible_truncation, reason = "buckets are few, and a const function has no TryFrom")]
const fn bucket(ns: u64) -> usize {
    if ns < SUB {
        return ns as usize;
    }
    let exponent = ns.ilog2() - SUB_BITS;
    ((exponent as u64 + 1) * SUB + (ns >> exponent) % SUB) as usize
}

/// The first time above a bucket, ns.
fn end(bucket: usize) -> u64 {
    let bucket = bucket as u64 + 1;
    if bucket <= SUB { bucket } else { (SUB + bucket % SUB) << (bucket / SUB - 1) }
}

/// Times of one operation, with one writer. On cache lines of its own (two, because x86 fetches lines in pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Histogram {
    buckets: [Counter; BUCKETS],
    nanoseconds: Counter,
}

/// Times by operation, with one writer.
#[derive(Debug)]
pub(super) struct Latencies([Box<Histogram>; OPERATIONS.len()]);

impl Default for Latencies {
    fn default() -> Self {
        Self(std::array::from_fn(|_| {
            let buckets = std::array::from_fn(|_| Counter::default());
            Box::new(Histogram { buckets, nanoseconds: Counter::default() })
        }))
    }
}

impl Latencies {
    /// Only the owning worker calls this.
    pub(super) fn record(&self, operation: Operation, ns: u64) {
        let histogram = &self.0[match operation {
            Operation::Read => 0,
            Operation::Write => 1,
            Operation::Flush => 2,
            Operation::Discard => 3,
            Operation::WriteZeroes { .. } => 4,
            Operation::ZoneAppend => 5,
            Operation::ZoneReport => 6,
            Operation::ManageZone(_) => 7,
        }];
        histogram.buckets[bucket(ns.min(LONGEST))].add(1);
        histogram.nanoseconds.add(ns);
    }

    /// Adds these to `sums`, which are in the order of [`OPERATIONS`].
    pub(super) fn add_to(&self, sums: &mut [LatencySummary; OPERATIONS.len()]) {
        for (sum, histogram) in sums.iter_mut().zip(&self.0) {
            for (all, bucket) in sum.buckets.iter_mut().zip(&histogram.buckets) {
                *all += bucket.get();
            }
            sum.nanoseconds += histogram.nanoseconds.get();
        }
    }
}

/// The times of one operation, of one or more workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencySummary {
    buckets: Vec<u64>,
    nanoseconds: u64,
}

impl Default for LatencySummary {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], nanoseconds: 0 }
    }
}

impl LatencySummary {
    /// Adds the times of others.
    pub fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, part)| *sum += part);
        self.nanoseconds += other.nanoseconds;
    }

    /// How many requests were timed.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The sum of their times.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds)
    }

    /// A time that `permille` of 1000 requests do not exceed; `None` if none was timed.
    #[must_use]
    pub fn quantile(&self, permille: u64) -> Option<Duration> {
        let count = self.count();
        let rank = u128::from(count) * u128::from(permille);
        let rank = u64::try_from(rank.div_ceil(1000)).ok()?.max(1);
        let mut seen = 0;
        let within = self.buckets.iter().position(|bucket| {
            seen += bucket;
            seen >= rank
        })?;
        Some(Duration::from_nanos(end(within)))
    }

    /// How many took less than 2 to the power of `exponent` ns.
    #[must_use]
    pub fn below_power(&self, exponent: u32) -> u64 {
        let end = bucket((1 << exponent.clamp(SUB_BITS, 39)) - 1);
        self.buckets[..=end].iter().sum()
    }
}

/// A worker's clock for its requests. It stands at 0 while nothing is measured.
#[derive(Debug)]
pub(super) struct RequestClock {
    start: Instant,
    on: bool,
    /// ns since `start`, at least 1; 0 if nothing is measured.
    pub(super) now: u64,
}

impl RequestClock {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), on: false, now: 0 }
    }

    pub(super) fn measure(&mut self, on: bool) {
        (self.on, self.now) = (on, 0);
    }

    /// Reads the time, if it is wanted.
    #[inline]
    pub(super) fn tick(&mut self) {
        if self.on {
            self.now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        }
    }

    /// How long a request has taken that began at `started`; `None` if one of the two times was not measured.
    #[inline]
    pub(super) fn since(&self, started: u64) -> Option<u64> {
        (started != 0 && self.now != 0).then(|| self.now.saturating_sub(started))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(latencies: &Latencies) -> [LatencySummary; OPERATIONS.len()] {
        let mut sums = std::array::from_fn(|_| LatencySummary::default());
        latencies.add_to(&mut sums);
        sums
    }

    #[test]
    fn the_times_of_two_workers_share_no_pair_of_cache_lines() {
        assert!(align_of::<Histogram>().is_multiple_of(128));
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for index in 0..BUCKETS {
            let after = end(index);
            assert_eq!(bucket(after - 1), index, "the last of bucket {index}");
            assert_eq!(bucket(after), index + 1, "the first above bucket {index}");
        }
    }

    #[test]
    fn a_quantile_is_at_most_a_sixteenth_too_high() {
        let latencies = Latencies::default();
        (1..=1000).for_each(|n| latencies.record(Operation::Read, n * 1000));

        let read = &summary(&latencies)[0];

        for (permille, exact) in [(500, 500_000), (990, 990_000), (999, 999_000), (1000, 1_000_000)] {
            let found = read.quantile(permille).unwrap().as_nanos();
            assert!(found >= exact && found <= exact + exact / 16, "{permille}: {found}");
        }
        assert_eq!((read.count(), read.total()), (1000, Duration::from_micros(500_500)));
        assert_eq!(read.below_power(19), 524, "524288 ns");
        assert_eq!(summary(&latencies)[1].quantile(500), None, "no write");
    }

    #[test]
    fn a_time_without_end_counts_as_the_longest() {
        let latencies = Latencies::default();
        latencies.record(Operation::Flush, u64::MAX);
        assert_eq!(summary(&latencies)[2].quantile(999), Some(Duration::from_nanos(LONGEST + 1)));
    }

    #[test]
    fn a_request_is_timed_only_if_its_begin_and_its_end_were_measured() {
        let mut clock = RequestClock::new();
        clock.tick();
        assert_eq!((clock.now, clock.since(0)), (0, None), "off");
        clock.measure(true);
        clock.tick();
        let started = clock.now;
        assert!(started > 0 && clock.since(started).is_some());
        assert_eq!(clock.since(0), None, "it began before");
        clock.measure(false);
        assert_eq!(clock.since(started), None, "it ends after");
    }
}
