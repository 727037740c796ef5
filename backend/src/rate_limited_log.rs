//! Keeps a misbehaving guest or device from filling the log: a few lines per interval, then one that says how many were left out.

use std::time::{Duration, Instant};

/// Lines let through per interval.
const BURST: u32 = 8;
/// The interval.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counts lines; consulted on error paths only.
#[derive(Clone, Copy)]
pub(crate) struct RateLimitedLog {
    /// `module_path!()` of the owner.
    target: &'static str,
    since: Option<Instant>,
    lines: u32,
    left_out: u32,
}

impl RateLimitedLog {
    /// For lines of the module `target`, for which alone `RUST_LOG` may ask.
    pub(crate) const fn of(target: &'static str) -> Self {
        Self { target, since: None, lines: 0, left_out: 0 }
    }

    /// Writes the line, a warning, unless too many came before it within the interval.
    pub(crate) fn warn(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Warn, line);
    }

    /// The same for an error.
    pub(crate) fn error(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Error, line);
    }

    /// The same for what is no mistake.
    pub(crate) fn info(&mut self, line: impl FnOnce() -> String) {
        self.log(log::Level::Info, line);
    }

    fn log(&mut self, level: log::Level, line: impl FnOnce() -> String) {
        if let Some(left_out) = self.admit(Instant::now()) {
            if left_out != 0 {
                log::log!(target: self.target, level, "({left_out} similar lines left out)");
            }
            log::log!(target: self.target, level, "{}", line());
        }
    }

    /// `Some` if a line may be written now, with the number of lines left out since the last one.
    fn admit(&mut self, now: Instant) -> Option<u32> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= INTERVAL) {
            self.since = Some(now);
            self.lines = 0;
        }
        if self.lines == BURST {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut limit = RateLimitedLog::of(module_path!());
        let start = Instant::now();

        let written = (0..100).filter(|_| limit.admit(start).is_some()).count();
        let after_the_interval = limit.admit(start + INTERVAL);

        assert_eq!(written, BURST as usize);
        assert_eq!(after_the_interval, Some(100 - BURST));
        assert_eq!(limit.admit(start + INTERVAL), Some(0));
    }
}
