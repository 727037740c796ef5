//! The log of this process, on standard error. Its level can change at run time. If systemd's journal is at the other end, each
//! line begins with its priority (sd-daemon(3)), and the journal knows the time.

use std::env;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use env_logger::{Builder, Logger};
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::fs::fstat;

use super::several::line_prefix;

/// True from the first change of the level on.
static CHANGED: AtomicBool = AtomicBool::new(false);

/// A logger with the filter of the start, which RUST_LOG may set by module, and one that leaves the level to `log`.
struct Switch {
    filtered: Logger,
    unfiltered: Logger,
}

impl Switch {
    fn current(&self) -> &Logger {
        if CHANGED.load(Ordering::Relaxed) { &self.unfiltered } else { &self.filtered }
    }
}

impl Log for Switch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.current().enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.current().log(record);
    }

    fn flush(&self) {}
}

/// Starts the log with `level`, or with what RUST_LOG says. `several`: each line names the disk that its thread serves.
pub(crate) fn start(level: LevelFilter, several: bool) {
    let builder = || builder(several);
    let filtered = builder().filter_level(level).parse_default_env().build();
    let most = filtered.filter();
    let unfiltered = builder().filter_level(LevelFilter::Trace).build();
    if log::set_boxed_logger(Box::new(Switch { filtered, unfiltered })).is_ok() {
        log::set_max_level(most);
    }
}

/// Changes the level for all modules.
pub(crate) fn set_level(level: LevelFilter) {
    log::set_max_level(LevelFilter::Info);
    log::info!("the operator sets the log level to {}", level.to_string().to_lowercase());
    CHANGED.store(true, Ordering::Relaxed);
    log::set_max_level(level);
}

fn builder(several: bool) -> Builder {
    let mut builder = Builder::new();
    let disk = move || if several { line_prefix() } else { String::new() };
    if is_journal() {
        builder.format(move |out, record| {
            let (text, priority) = (record.args().to_string(), priority(record.level()));
            text.lines().try_for_each(|line| writeln!(out, "<{priority}>{}: {}{line}", record.target(), disk()))
        });
    } else if several {
        builder.format(move |out, record| {
            let (time, level, target) = (out.timestamp(), record.level(), record.target());
            writeln!(out, "[{time} {level:<5} {target}] {}{}", disk(), record.args())
        });
    }
    builder
}

/// True if standard error is the stream to the journal that JOURNAL_STREAM names by device and inode (systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|file| stream == format!("{}:{}", file.st_dev, file.st_ino))
}

/// The priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}
