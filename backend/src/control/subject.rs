//! What is looked at and controlled: one device, and whoever is served.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::board::Board;
use crate::coherency::{Facts, Verdict, decide};
use crate::engine::{Handle, Held, LatencySummary, OPERATIONS, Statistics, WorkerReport};
use crate::hardware::{AddressSpace, SpaceStatistics};

use super::answers::{self, latencies};

/// How old counters may be that are shown. So clients that ask without end do not take the workers' cache lines from them.
const SNAPSHOT_AGE: Duration = Duration::from_millis(100);

/// How the device is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Personality {
    /// An NVMe drive as a virtio disk.
    VhostUserBlk,
    /// A whole function.
    VfioUser,
}

/// What only the program can do.
pub struct Hooks {
    /// Changes the log level.
    pub set_log_level: Box<dyn Fn(log::LevelFilter) + Send + Sync>,
    /// Starts a successor; the error says why that is not possible.
    pub start_successor: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Lets a front-end wait while another is served, with the socket of its VM's shim, or no longer.
    pub permit_successor: PermitFn,
}

/// See [`Hooks::permit_successor`].
pub type PermitFn = Box<dyn Fn(Option<Option<PathBuf>>) -> Result<(), String> + Send + Sync>;

/// See the top of this file.
pub struct Subject {
    personality: Personality,
    device: String,
    facts: Facts,
    board: Arc<Board>,
    space: Arc<dyn AddressSpace>,
    /// `None` for a whole function, which the guest drives.
    engine: Option<Handle>,
    hooks: Hooks,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    measured: bool,
    snapshot: Option<(Instant, Arc<Snapshot>)>,
}

/// Counters of one moment.
pub(crate) struct Snapshot {
    pub(crate) counters: Statistics,
    pub(crate) workers: Vec<WorkerReport>,
    pub(crate) latencies: [LatencySummary; OPERATIONS.len()],
}

const NO_ENGINE: &str = "the guest drives a whole function itself; this program sees none of its requests";

impl Subject {
    /// The device `name`, served as `personality`. `engine` is that of a disk.
    #[must_use]
    pub fn new(
        (personality, device): (Personality, String),
        facts: Facts,
        board: Arc<Board>,
        space: Arc<dyn AddressSpace>,
        engine: Option<Handle>,
        hooks: Hooks,
    ) -> Self {
        let (started, state) = (Instant::now(), Mutex::default());
        Self { personality, device, facts, board, space, engine, hooks, started, state }
    }

    /// Measures how long requests take, or no longer.
    ///
    /// # Errors
    /// There are no requests to measure.
    pub fn measure(&self, on: bool) -> Result<(), String> {
        self.engine()?.measure(on);
        self.state().measured = on;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine(&self) -> Result<&Handle, String> {
        self.engine.as_ref().ok_or_else(|| NO_ENGINE.to_owned())
    }

    pub(crate) fn personality(&self) -> &'static str {
        match self.personality {
            Personality::VhostUserBlk => "vhost-user-blk",
            Personality::VfioUser => "vfio-user",
        }
    }

    pub(crate) fn device(&self) -> &str {
        &self.device
    }

    pub(crate) fn verdict_word(&self) -> &'static str {
        decide(&self.facts).word()
    }

    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    pub(crate) fn space(&self) -> SpaceStatistics {
        self.space.statistics()
    }

    pub(crate) fn device_state(&self) -> Option<crate::engine::DeviceState> {
        self.engine.as_ref().map(Handle::device_state)
    }

    /// The counters; `None` for a whole function.
    pub(crate) fn snapshot(&self) -> Option<Arc<Snapshot>> {
        let engine = self.engine.as_ref()?;
        let mut state = self.state();
        if let Some((at, snapshot)) = &state.snapshot
            && at.elapsed() < SNAPSHOT_AGE
        {
            return Some(Arc::clone(snapshot));
        }
        let (counters, workers) = (engine.statistics(), engine.workers());
        let mut latencies = std::array::from_fn(|_| LatencySummary::default());
        for worker in &workers {
            latencies.iter_mut().zip(&worker.latencies).for_each(|(sum, part)| sum.add(part));
        }
        let snapshot = Arc::new(Snapshot { counters, workers, latencies });
        state.snapshot = Some((Instant::now(), Arc::clone(&snapshot)));
        Some(snapshot)
    }

    pub(super) fn status(&self) -> answers::Status {
        let posted = self.board.read();
        answers::Status {
            program: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            personality: self.personality(),
            device: self.device.clone(),
            device_state: self.device_state().map(|state| state.to_string()),
            drained: self.state().held.is_some(),
            front_end: posted.front_end.map(|front_end| answers::FrontEnd {
                name: front_end.name,
                pid: front_end.pid,
                uid: front_end.uid,
                connected_s: front_end.since.elapsed().as_secs(),
            }),
            next_front_end: posted.next,
            front_ends_served: posted.front_ends,
            verdict: self.verdict_word(),
            mapped_bytes: self.space().mapped,
            log_level: log::max_level().to_string().to_lowercase(),
        }
    }

    pub(super) fn verdict(&self) -> answers::Verdict {
        let verdict = decide(&self.facts);
        answers::Verdict {
            serves: !matches!(verdict, Verdict::Refuse(_)),
            verdict: verdict.word(),
            reason: verdict.to_string(),
            snoop_enforced: self.facts.snoop_enforced,
            no_snoop: self.facts.no_snoop.to_string(),
        }
    }

    pub(super) fn memory(&self) -> answers::Memory {
        let SpaceStatistics { maps, mapped, staged, flushed_at_map, flushed_at_unmap, flush_time } = self.space();
        answers::Memory {
            mapped_bytes: mapped,
            maps,
            staged,
            flushed_at_map_bytes: flushed_at_map,
            flushed_at_unmap_bytes: flushed_at_unmap,
            flush_us: u64::try_from(flush_time.as_micros()).unwrap_or(u64::MAX),
            pinned: self.space.pins(),
            released: self.space.is_released(),
            regions: self.board.read().regions,
        }
    }

    pub(super) fn stats(&self) -> Result<answers::Stats, String> {
        let snapshot = self.snapshot().ok_or(NO_ENGINE)?;
        let worker = |(worker, report): (usize, &WorkerReport)| answers::Worker {
            worker,
            cpus: report.cpus.map(|cpus| cpus.to_string()),
            counters: report.statistics,
            virtqueues: report.rings.clone(),
            latency: latencies(&report.latencies),
        };
        Ok(answers::Stats {
            counters: snapshot.counters,
            latency_measured: self.state().measured,
            latency: latencies(&snapshot.latencies),
            workers: snapshot.workers.iter().enumerate().map(worker).collect(),
        })
    }

    pub(super) fn set_log_level(&self, level: log::LevelFilter) {
        (self.hooks.set_log_level)(level);
    }

    /// Waits for requests in flight, up to `limit`.
    pub(super) fn drain(&self, limit: Duration) -> Result<(), String> {
        let engine = self.engine()?;
        if self.state().held.is_some() {
            return Err("it is drained already; resume takes requests again".into());
        }
        let held = engine.hold(limit).map_err(|error| format!("not drained: {error}; requests are taken as before"))?;
        self.state().held = Some(held);
        log::info!("drained: requests wait in their rings until the operator resumes");
        Ok(())
    }

    pub(super) fn resume(&self) -> Result<(), String> {
        self.engine()?;
        let held = self.state().held.take();
        drop(held.ok_or("it is not drained")?);
        log::info!("resumed: requests are taken again");
        Ok(())
    }

    pub(super) fn reset_device(&self) -> Result<(), String> {
        let engine = self.engine()?;
        log::info!("the operator has the device reset");
        engine.reset_device().map_err(|error| format!("{error:#}"))
    }

    pub(super) fn identify(&self) -> Result<answers::Identify, String> {
        let identification = self.engine()?.identify().map_err(|error| format!("{error:#}"))?;
        Ok(answers::Identify { identification })
    }

    pub(super) fn smart(&self) -> Result<answers::Smart, String> {
        let health = self.engine()?.health().map_err(|error| format!("{error:#}"))?;
        Ok(answers::Smart { health })
    }

    pub(super) fn permit_successor(&self, permission: Option<Option<PathBuf>>) -> Result<(), String> {
        (self.hooks.permit_successor)(permission)
    }

    pub(super) fn start_successor(&self) -> Result<(), String> {
        (self.hooks.start_successor)()
    }
}
