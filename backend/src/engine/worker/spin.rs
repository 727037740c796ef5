//! How long a worker that has nothing to do polls before it sleeps: up to the limit of `--poll-us`, or not at all where that would
//! be in vain. A drive that takes 80 µs is not polled for 50 µs before each completion.
//!
//! ```text
//!             two waits in a row polled in vain, with fewer than 4 before each that polling has ended
//!   Polling ----------------------------------------------------------------------------------------> Sleeping
//!      ^                                                                                                 |
//!      +---- two sleeps in a row that the limit would have covered; or 64 sleeps, and then for one wait ---+
//! ```
//!
//! There are two kinds of waits, each with a state of its own: for the device while commands are in flight, else for the driver's
//! next request. A guest that reads one block after the other from that drive has a long wait of the first kind and then a short one
//! of the second, again and again.
//!
//! Polling that ends a wait saves a sleep and a wake-up. So a wait that is polled in vain counts only if few before it were not.
//! The pause between two bursts does not count, and neither does that between two batches of completions.
//!
//! A sleep is measured with its wake-up, which can take longer than the wait itself. So after some sleeps one wait is polled to
//! see how long it is.
//!
//! Nothing here is called for a request: only when the worker begins to wait, and when it has slept.

use std::time::Duration;

/// A wake-up costs roughly a quarter of the default limit, so this many saved ones pay for polling in vain.
const ENOUGH: u32 = 4;
/// One wait of another length is an accident.
const IN_A_ROW: u8 = 2;
/// Polling in vain once in so many sleeps costs less than a microsecond each, with the default limit.
const SLEEPS_PER_TRIAL: u8 = 64;

/// What a worker waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The next request.
    Driver,
    /// The completion of a command, or the next request.
    Device,
}

/// See the top of this file.
#[derive(Debug)]
pub(super) struct Spin {
    limit: Duration,
    awaited: Awaited,
    driver: Waits,
    device: Waits,
}

/// The waits of one kind.
#[derive(Debug)]
enum Waits {
    /// `begun`: waits since the last sleep. `in_vain`: sleeps in a row that count.
    Polling { begun: u32, in_vain: u8 },
    /// `covered`: sleeps in a row that were no longer than the limit. `sleeps`: all since the last trial.
    Sleeping { covered: u8, sleeps: u8 },
}

impl Spin {
    /// Polls for `limit` until it knows better.
    pub(super) fn new(limit: Duration) -> Self {
        let polling = || Waits::Polling { begun: 0, in_vain: 0 };
        Self { limit, awaited: Awaited::Driver, driver: polling(), device: polling() }
    }

    /// The worker has found nothing to do, for the first time since it had something.
    pub(super) fn begin(&mut self, awaited: Awaited) {
        self.awaited = awaited;
        if let Waits::Polling { begun, .. } = self.waits() {
            *begun = begun.saturating_add(1);
        }
    }

    /// How long to poll in this wait.
    pub(super) fn window(&mut self) -> Duration {
        match self.waits() {
            Waits::Polling { .. } => self.limit,
            Waits::Sleeping { .. } => Duration::ZERO,
        }
    }

    /// The wait has ended with a sleep, until something happened. It took `wait`, with the time of polling.
    pub(super) fn slept(&mut self, wait: Duration) {
        let covered = wait < self.limit;
        let waits = self.waits();
        *waits = waits.after_sleep(covered);
    }

    fn waits(&mut self) -> &mut Waits {
        match self.awaited {
            Awaited::Driver => &mut self.driver,
            Awaited::Device => &mut self.device,
        }
    }
}

impl Waits {
    fn after_sleep(&self, covered: bool) -> Self {
        match *self {
            // All but the last one ended while they were polled.
            Self::Polling { begun, .. } if begun > ENOUGH => Self::Polling { begun: 0, in_vain: 0 },
            Self::Polling { in_vain, .. } if in_vain + 1 < IN_A_ROW => Self::Polling { begun: 0, in_vain: in_vain + 1 },
            Self::Polling { .. } => Self::Sleeping { covered: 0, sleeps: 0 },
            Self::Sleeping { covered: before, sleeps } => {
                let (covered, sleeps) = (if covered { before + 1 } else { 0 }, sleeps + 1);
                match () {
                    () if covered == IN_A_ROW => Self::Polling { begun: 0, in_vain: 0 },
                    // If it is in vain, it is the last one.
                    () if sleeps == SLEEPS_PER_TRIAL => Self::Polling { begun: 0, in_vain: IN_A_ROW - 1 },
                    () => Self::Sleeping { covered, sleeps },
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);
    const WAKE_UP: Duration = Duration::from_micros(5);

    fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    /// Waits for what happens `after`. Returns the time that was polled, and whether the worker slept.
    fn wait(spin: &mut Spin, awaited: Awaited, after: Duration) -> (Duration, bool) {
        spin.begin(awaited);
        let window = spin.window();
        let slept = after >= window;
        if slept {
            spin.slept(after + WAKE_UP);
        }
        (window.min(after), slept)
    }

    /// The time that is polled, and the sleeps, in `count` waits.
    fn waits(spin: &mut Spin, awaited: Awaited, after: Duration, count: u32) -> (Duration, u32) {
        let all = (0..count).map(|_| wait(spin, awaited, after));
        all.fold((Duration::ZERO, 0), |(polled, sleeps), (window, slept)| (polled + window, sleeps + u32::from(slept)))
    }

    #[test]
    fn a_wait_longer_than_the_limit_is_not_polled_any_more_after_two() {
        let mut spin = Spin::new(LIMIT);
        assert_eq!(waits(&mut spin, Awaited::Device, micros(80), 1), (LIMIT, 1));
        assert_eq!(waits(&mut spin, Awaited::Device, micros(80), 1), (LIMIT, 1));
        assert_eq!(waits(&mut spin, Awaited::Device, micros(80), 64), (Duration::ZERO, 64));
    }

    #[test]
    fn a_wait_below_the_limit_is_polled_and_never_ends_in_a_sleep() {
        let mut spin = Spin::new(LIMIT);
        assert_eq!(waits(&mut spin, Awaited::Device, micros(10), 1000), (micros(10) * 1000, 0));
    }

    #[test]
    fn the_two_kinds_do_not_influence_each_other() {
        let mut spin = Spin::new(LIMIT);
        for _ in 0..10 {
            wait(&mut spin, Awaited::Device, micros(80));
            assert_eq!(wait(&mut spin, Awaited::Driver, micros(2)), (micros(2), false));
        }
        assert_eq!(wait(&mut spin, Awaited::Device, micros(80)), (Duration::ZERO, true));
    }

    #[test]
    fn two_short_sleeps_in_a_row_start_polling_again() {
        let mut spin = Spin::new(LIMIT);
        waits(&mut spin, Awaited::Driver, micros(900), 2);
        for after in [10, 900, 10] {
            assert_eq!(wait(&mut spin, Awaited::Driver, micros(after)), (Duration::ZERO, true), "{after} µs");
        }
        assert_eq!(wait(&mut spin, Awaited::Driver, micros(10)), (Duration::ZERO, true), "the second one");
        assert_eq!(wait(&mut spin, Awaited::Driver, micros(10)), (micros(10), false));
    }

    #[test]
    fn the_pause_after_a_burst_does_not_count() {
        let mut spin = Spin::new(LIMIT);
        for _ in 0..100 {
            assert_eq!(waits(&mut spin, Awaited::Device, micros(5), ENOUGH), (micros(5) * ENOUGH, 0));
            assert_eq!(wait(&mut spin, Awaited::Device, micros(500)), (LIMIT, true));
        }
        waits(&mut spin, Awaited::Device, micros(5), ENOUGH - 1);
        wait(&mut spin, Awaited::Device, micros(500));
        waits(&mut spin, Awaited::Device, micros(5), ENOUGH - 1);
        wait(&mut spin, Awaited::Device, micros(500));
        assert_eq!(wait(&mut spin, Awaited::Device, micros(5)), (Duration::ZERO, true), "too few twice in a row");
    }

    #[test]
    fn one_pause_is_an_accident() {
        let mut spin = Spin::new(LIMIT);
        wait(&mut spin, Awaited::Driver, micros(900));
        waits(&mut spin, Awaited::Driver, micros(5), ENOUGH);
        wait(&mut spin, Awaited::Driver, micros(900));
        wait(&mut spin, Awaited::Driver, micros(900));
        assert_eq!(wait(&mut spin, Awaited::Driver, micros(5)), (micros(5), false), "one in a row");
    }

    #[test]
    fn a_trial_finds_waits_that_only_their_wake_ups_make_long() {
        let mut spin = Spin::new(LIMIT);
        waits(&mut spin, Awaited::Device, micros(80), 2);
        let (polled, sleeps) = waits(&mut spin, Awaited::Device, micros(47), 1000);
        assert_eq!(sleeps, 64, "measured as 52 µs");
        assert_eq!(polled, micros(47) * (1000 - 64));
    }

    #[test]
    fn a_trial_in_vain_is_one_wait() {
        let mut spin = Spin::new(LIMIT);
        waits(&mut spin, Awaited::Device, micros(80), 2);
        assert_eq!(waits(&mut spin, Awaited::Device, micros(80), 65 * 100), (LIMIT * 100, 65 * 100));
    }

    #[test]
    fn without_a_limit_nothing_is_polled() {
        let mut spin = Spin::new(Duration::ZERO);
        assert_eq!(waits(&mut spin, Awaited::Driver, Duration::ZERO, 100), (Duration::ZERO, 100));
    }

    proptest! {
        /// Whatever comes, waits polled in vain are bounded by those that polling has ended, and by those that were not polled.
        #[test]
        fn polling_in_vain_is_paid_for(waits in proptest::collection::vec((any::<bool>(), 0..200_u64), 1..2000)) {
            let mut spin = Spin::new(LIMIT);
            let (mut saved, mut not_polled, mut in_vain) = (0_u32, 0_u32, 0_u32);
            for (device, after) in waits {
                let awaited = if device { Awaited::Device } else { Awaited::Driver };
                let (polled, slept) = wait(&mut spin, awaited, micros(after));
                prop_assert!(polled <= LIMIT);
                saved += u32::from(!slept);
                not_polled += u32::from(polled.is_zero() && slept);
                in_vain += u32::from(slept && !polled.is_zero());
            }
            // Two at first of each kind, two for two that were not polled, and one with each that four have paid for.
            prop_assert!(in_vain <= 4 + saved / 2 + not_polled, "{} {} {}", in_vain, saved, not_polled);
        }
    }
}
