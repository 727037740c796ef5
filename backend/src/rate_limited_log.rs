//! A rate-limited log, so that a misbehaving guest or device cannot flood the log. At most a few lines per interval are
//! written; the next line after that reports how many were suppressed.

use std::time::{Duration, Instant};

/// Maximum lines per interval.
const BURST: u32 = 8;
/// The interval. Short enough to show an ongoing problem, long enough to keep the log readable.
const INTERVAL: Duration = Duration::from_secs(10);

/// A logger with its own limit. For rare paths only: it reads the clock.
#[derive(Clone, Copy)]
pub(crate) struct RateLimitedLog {
    /// The log target: `module_path!()` of the owner.
    target: &'static str,
    since: Option<Instant>,
    lines: u32,
    suppressed: u32,
}

impl RateLimitedLog {
    /// A logger for `target`, normally `module_path!()`, so that `RUST_LOG` can filter by module.
    pub(crate) const fn new(target: &'static str) -> Self {
        Self { target, since: None, lines: 0, suppressed: 0 }
    }

    /// Logs a warning, unless the limit of the interval is reached.
    pub(crate) fn warn(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Warn, line);
    }

    /// Logs an error, with the same limit.
    pub(crate) fn error(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Error, line);
    }

    /// Logs information, with the same limit.
    pub(crate) fn info(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Info, line);
    }

    fn log(&mut self, level: log::Level, line: impl FnOnce() -> String) {
        if let Some(suppressed) = self.admit(Instant::now()) {
            if suppressed != 0 {
                log::log!(target: self.target, level, "({suppressed} similar messages suppressed)");
            }
            log::log!(target: self.target, level, "{}", line());
        }
    }

    /// `Some` if a line may be written now, with the number of lines suppressed since the last one.
    fn admit(&mut self, now: Instant) -> Option<u32> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= INTERVAL) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == BURST {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.suppressed))
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
        let after_the_interval = limit.admit(start + INTERVAL);

        assert_eq!(written, BURST as usize);
        assert_eq!(after_the_interval, Some(100 - BURST));
        assert_eq!(limit.admit(start + INTERVAL), Some(0));
    }
}
