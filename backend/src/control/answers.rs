//! The results of commands. The names here are those of the protocol.

use serde::Serialize;

use crate::board::SharedRegion;
use crate::driver::{Health, Identification};
use crate::engine::{LatencySummary, OPERATIONS, RingStatistics, Statistics};

#[derive(Serialize)]
pub(super) struct Status {
    pub(super) program: &'static str,
    pub(super) pid: u32,
    pub(super) uptime_s: u64,
    /// `vhost-user-blk` or `vfio-user`.
    pub(super) personality: &'static str,
    pub(super) device: String,
    /// `up`, `busy`, `down`, `gone`; null for a whole function, which the guest drives.
    pub(super) device_state: Option<String>,
    /// Requests wait in their rings because an operator wants it.
    pub(super) drained: bool,
    pub(super) front_end: Option<FrontEnd>,
    /// Who waits to take its place.
    pub(super) next_front_end: Option<String>,
    pub(super) front_ends_served: u64,
    /// `coherent`, `flush` or `refuse`.
    pub(super) verdict: &'static str,
    pub(super) mapped_bytes: u64,
    pub(super) log_level: String,
}

#[derive(Serialize)]
pub(super) struct FrontEnd {
    pub(super) name: String,
    pub(super) pid: Option<u32>,
    pub(super) uid: u32,
    pub(super) connected_s: u64,
}

#[derive(Serialize)]
pub(super) struct Verdict {
    pub(super) serves: bool,
    pub(super) verdict: &'static str,
    pub(super) reason: String,
    pub(super) snoop_enforced: bool,
    pub(super) no_snoop: String,
}

#[derive(Serialize)]
pub(super) struct Memory {
    /// Bytes mapped for the device now, with the driver's own.
    pub(super) mapped_bytes: u64,
    /// Pieces mapped since the start.
    pub(super) maps: u64,
    pub(super) staged: u64,
    pub(super) flushed_at_map_bytes: u64,
    pub(super) flushed_at_unmap_bytes: u64,
    pub(super) flush_us: u64,
    /// Mapped memory is pinned.
    pub(super) pinned: bool,
    /// The host has the device, so nothing is mapped now.
    pub(super) released: bool,
    /// What the front-end shares over vhost-user.
    pub(super) regions: Vec<SharedRegion>,
}

#[derive(Serialize)]
pub(super) struct Stats {
    pub(super) counters: Statistics,
    /// True if requests are being timed.
    pub(super) latency_measured: bool,
    pub(super) latency: Vec<Latency>,
    pub(super) workers: Vec<Worker>,
}

#[derive(Serialize)]
pub(super) struct Worker {
    pub(super) worker: usize,
    /// The CPUs that it runs on, such as `2-5,8`; null if they were not chosen.
    pub(super) cpus: Option<String>,
    pub(super) counters: Statistics,
    pub(super) virtqueues: Vec<RingStatistics>,
    pub(super) latency: Vec<Latency>,
}

/// Times in microseconds.
#[derive(Serialize)]
pub(super) struct Latency {
    pub(super) operation: &'static str,
    pub(super) count: u64,
    pub(super) mean_us: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
}

#[derive(Serialize)]
pub(super) struct Identify {
    #[serde(flatten)]
    pub(super) identification: Identification,
}

#[derive(Serialize)]
pub(super) struct Smart {
    #[serde(flatten)]
    pub(super) health: Health,
}

/// The operations of which any were timed.
pub(super) fn latencies(summaries: &[LatencySummary; OPERATIONS.len()]) -> Vec<Latency> {
    let timed = OPERATIONS.iter().zip(summaries).filter(|(_, summary)| summary.count() != 0);
    let microseconds = |time: Option<std::time::Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e6);
    timed
        .map(|(operation, summary)| Latency {
            operation,
            count: summary.count(),
            mean_us: summary.total().as_secs_f64() * 1e6 / summary.count() as f64,
            p50_us: microseconds(summary.quantile(500)),
            p99_us: microseconds(summary.quantile(990)),
            p999_us: microseconds(summary.quantile(999)),
        })
        .collect()
}
