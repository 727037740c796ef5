//! How long a worker sleeps while commands are in flight: for most of a second if the device interrupts, else until the
//! next look.
//!
//! The interval between looks follows the load: a look that finds a completion halves it, one that finds none doubles it. So
//! it settles near the time that the device takes for a command, and a slow command costs few looks.

use std::time::Duration;

use crate::driver::Queue;

/// About what a wake-up costs; a shorter sleep saves nothing.
const SHORTEST: Duration = Duration::from_micros(20);
/// Bounds the delay of a completion, and the looks at a device that hangs to 1000 a second.
const LONGEST: Duration = Duration::from_millis(1);

/// Longest sleep while commands are in flight. It bounds the delay if an interrupt is lost; the completion entry is not lost.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);

/// See the top of this file.
pub(super) struct PollTimer {
    interval: Duration,
}

impl Default for PollTimer {
    fn default() -> Self {
        Self { interval: SHORTEST }
    }
}

impl PollTimer {
    /// How long a worker may wait for notifications; `None`: until one comes. `tick` is the time between two checks of
    /// commands in flight.
    pub(super) fn longest_sleep(&self, queue: &dyn Queue, tick: Duration) -> Option<Duration> {
        match (queue.in_flight(), queue.is_polled()) {
            (0, _) => None,
            (_, true) => Some(self.interval.min(tick)),
            (_, false) => Some(LONGEST_SLEEP.min(tick)),
        }
    }

    /// `completed`: commands have completed since the last sleep.
    pub(super) fn adjust(&mut self, completed: bool) {
        let interval = if completed { self.interval / 2 } else { self.interval * 2 };
        self.interval = interval.clamp(SHORTEST, LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The looks until a command of this duration is seen to have completed, one of many that follow each other.
    fn looks_per_command(duration: Duration) -> (usize, Duration) {
        let mut timer = PollTimer::default();
        let (mut looks, mut late) = (0, Duration::ZERO);
        for _ in 0..100 {
            let mut slept = Duration::ZERO;
            while slept < duration {
                slept += timer.interval;
                timer.adjust(slept >= duration);
                looks += 1;
            }
            late += slept - duration;
        }
        (looks / 100, late / 100)
    }

    #[test]
    fn a_completion_is_seen_within_twice_the_time_of_the_command_and_within_a_millisecond() {
        for micros in [25, 100, 700, 3000] {
            let duration = Duration::from_micros(micros);
            let (looks, late) = looks_per_command(duration);
            assert!(late <= duration * 2 && late <= LONGEST, "{micros} µs: {late:?} late");
            assert!(looks <= 8, "{micros} µs: {looks} looks");
        }
    }

    #[test]
    fn a_device_that_hangs_is_looked_at_once_per_millisecond() {
        let mut timer = PollTimer::default();
        (0..20).for_each(|_| timer.adjust(false));
        assert_eq!(timer.interval, LONGEST);
        (0..20).for_each(|_| timer.adjust(true));
        assert_eq!(timer.interval, SHORTEST);
    }
}
