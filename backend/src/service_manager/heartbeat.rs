//! The watchdog of the service manager (sd_watchdog_enabled(3)): the thread that serves front-ends tells, at half of the interval
//! that the manager allows, that it is alive.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::notify;

/// A timer, readable when the next sign of life is due.
pub struct Heartbeat(OwnedFd);

impl Heartbeat {
    /// `None` if the manager does not watch this process. `successor`: this process takes the place of the one that it watches.
    ///
    /// # Errors
    /// The errno of `timerfd_create` or `timerfd_settime`.
    pub fn wanted(successor: bool) -> io::Result<Option<Self>> {
        let variable = |name| env::var(name).ok();
        let Some(interval) = interval(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"), successor) else {
            return Ok(None);
        };
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let time = Timespec::try_from(interval).map_err(io::Error::other)?;
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: time, it_value: time })?;
        Ok(Some(Self(timer)))
    }

    /// Tells that this thread is alive.
    pub(crate) fn beat(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
        notify::alive();
    }
}

impl AsFd for Heartbeat {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Half of the interval that is allowed, so that one beat may be late.
fn interval(allowed: Option<String>, pid: Option<String>, successor: bool) -> Option<Duration> {
    let allowed = allowed?.parse().ok().filter(|&microseconds: &u64| microseconds > 1)?;
    let is_mine = successor || pid.is_none_or(|pid| pid == std::process::id().to_string());
    is_mine.then(|| Duration::from_micros(allowed / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watched_process_and_its_successor_beat_at_half_of_the_interval() {
        let text = |text: &str| Some(text.to_owned());
        let half = Some(Duration::from_secs(15));
        assert_eq!(interval(text("30000000"), None, false), half);
        assert_eq!(interval(text("30000000"), text(&std::process::id().to_string()), false), half);
        assert_eq!(interval(text("30000000"), text("1"), false), None, "another process is watched");
        assert_eq!(interval(text("30000000"), text("1"), true), half);
        assert_eq!(interval(None, None, true), None);
        assert_eq!(interval(text("0"), None, false), None);
        assert_eq!(interval(text("soon"), None, false), None);
    }
}
