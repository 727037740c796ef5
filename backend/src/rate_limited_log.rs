//! Rate-limited logs, so that a misbehaving guest, front-end or device cannot flood the log. At most a few lines per interval
//! are written; the next line after that reports how many were suppressed.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many lines are written.
#[derive(Clone, Copy)]
pub(crate) struct Limit {
    /// Maximum lines per interval.
    lines: u32,
    interval: Duration,
}

impl Limit {
    /// For what should not happen. The interval is short enough to show an ongoing problem, and long enough to keep the log
    /// readable.
    const DEFAULT: Self = Self { lines: 8, interval: Duration::from_secs(10) };
    /// For what each front-end does once or a few times: connect, register, leave.
    pub(crate) const CONNECTIONS: Self = Self { lines: 64, interval: Duration::from_secs(60) };
    /// For memory that comes and goes. A virtual machine that boots causes about 60 lines, and memory that is plugged in or
    /// removed a few.
    pub(crate) const MEMORY: Self = Self { lines: 512, interval: Duration::from_secs(300) };
}

/// A logger with its own limit. For rare paths only: it reads the clock.
#[derive(Clone, Copy)]
pub(crate) struct RateLimitedLog {
    /// The log target: `module_path!()` of the owner.
    target: &'static str,
    limit: Limit,
    since: Option<Instant>,
    lines: u32,
    suppressed: u32,
}

impl RateLimitedLog {
    /// A logger for `target`, normally `module_path!()`, so that `RUST_LOG` can filter by module.
    pub(crate) const fn new(target: &'static str) -> Self {
        Self::with_limit(target, Limit::DEFAULT)
    }

    const fn with_limit(target: &'static str, limit: Limit) -> Self {
        Self { target, limit, since: None, lines: 0, suppressed: 0 }
    }

    /// Logs a warning, unless the limit of the interval is reached.
    pub(crate) fn warn(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Warn, line);
    }

    /// Logs an error, with the same limit.
    pub(crate) fn error(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Error, line);
    }

    fn log(&mut self, level: log::Level, line: impl FnOnce() -> String) {
        if let Some(suppressed) = self.admit(Instant::now()) {
            self.report(level, suppressed);
            log::log!(target: self.target, level, "{}", line());
        }
    }

    fn report(&self, level: log::Level, suppressed: u32) {
        if suppressed != 0 {
            log::log!(target: self.target, level, "({suppressed} similar messages suppressed)");
        }
    }

    /// `Some` if a line may be written now, with the number of lines suppressed since the last one.
    fn admit(&mut self, now: Instant) -> Option<u32> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= self.limit.interval) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == self.limit.lines {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// A [`RateLimitedLog`] that outlives the front-ends that cause its lines, so that one that connects again and again gets no
/// more of them. What is suppressed at the end is counted when it is dropped.
pub(crate) struct SharedLog(Mutex<RateLimitedLog>);

impl SharedLog {
    /// See [`RateLimitedLog::new`].
    pub(crate) const fn new(target: &'static str) -> Self {
        Self::with_limit(target, Limit::DEFAULT)
    }

    /// The same, with another limit.
    pub(crate) const fn with_limit(target: &'static str, limit: Limit) -> Self {
        Self(Mutex::new(RateLimitedLog::with_limit(target, limit)))
    }

    /// See [`RateLimitedLog::warn`].
    pub(crate) fn warn(&self, line: impl FnOnce() -> String) {
        self.log(log::Level::Warn, line);
    }

    /// See [`RateLimitedLog::error`].
    pub(crate) fn error(&self, line: impl FnOnce() -> String) {
        self.log(log::Level::Error, line);
    }

    /// Logs information, with the same limit.
    pub(crate) fn info(&self, line: impl FnOnce() -> String) {
        self.log(log::Level::Info, line);
    }

    fn log(&self, level: log::Level, line: impl FnOnce() -> String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).log(level, line);
    }
}

impl Drop for SharedLog {
    fn drop(&mut self) {
        let log = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        log.report(log::Level::Info, log.suppressed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_suppressed_and_counted() {
        let mut limit = RateLimitedLog::new(module_path!());
        let start = Instant::now();

        let written = (0..100).filter(|_| limit.admit(start).is_some()).count();
        let next = start + Limit::DEFAULT.interval;
        let after_the_interval = limit.admit(next);

        assert_eq!(written, Limit::DEFAULT.lines as usize);
        assert_eq!(after_the_interval, Some(100 - Limit::DEFAULT.lines));
        assert_eq!(limit.admit(next), Some(0));
    }
}
