//! The log of a test that is alone in its process (`own_process`).

use std::sync::Mutex;

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps the lines, from information on.
struct Lines;

impl log::Log for Lines {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.lock().expect("no thread panics here").push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Keeps the log of this process from now on.
///
/// # Panics
/// If something keeps it already.
pub fn keep_log() {
    log::set_logger(&Lines).expect("the only logger");
    log::set_max_level(log::LevelFilter::Info);
}

/// The lines so far.
///
/// # Panics
/// If a thread has panicked while it logged.
#[must_use]
pub fn lines() -> Vec<String> {
    LINES.lock().expect("no thread panics here").clone()
}

/// How many of them contain `part`.
///
/// # Panics
/// As [`lines`].
#[must_use]
pub fn lines_with(part: &str) -> usize {
    lines().iter().filter(|line| line.contains(part)).count()
}
