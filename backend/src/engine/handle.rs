//! What an operator may see and ask of a running engine, from any thread. Reading the counters takes no lock and asks no worker;
//! it only shares the cache lines that they write.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::hold::{Held, Holds};
use super::latency::{LatencySummary, OPERATIONS};
use super::recovery::{DeviceState, DeviceSupervisor};
use super::statistics::{Counters, RingStatistics, Statistics};
use super::worker::{CommandQueue, WorkerCommand};
use super::{Engine, EngineError};
use crate::driver::{Geometry, Health, Identification};
use crate::placement::CpuList;

/// See the top of this file. It outlives the engine; then it answers with errors.
#[derive(Clone)]
pub struct Handle {
    workers: Vec<(Arc<CommandQueue>, Arc<Counters>)>,
    cpus: Arc<[Option<CpuList>]>,
    supervisor: Arc<DeviceSupervisor>,
    /// The number of the disk.
    disk: usize,
    holds: Holds,
}

/// What one worker has counted.
#[derive(Clone, Debug)]
pub struct WorkerReport {
    /// Its counters; those of the device are 0.
    pub statistics: Statistics,
    /// Where it runs, if that was chosen.
    pub cpus: Option<CpuList>,
    /// Its virtqueues.
    pub rings: Vec<RingStatistics>,
    /// The times of its requests, in the order of [`OPERATIONS`].
    pub latencies: [LatencySummary; OPERATIONS.len()],
}

impl Engine {
    /// What an operator may see and ask.
    #[must_use]
    pub fn handle(&self) -> Handle {
        let workers =
            self.workers.iter().map(|worker| (Arc::clone(&worker.command_queue), Arc::clone(&worker.counters)));
        let (supervisor, holds) = (Arc::clone(&self.supervisor), self.holds.clone());
        let cpus = self.workers.iter().map(|worker| worker.cpus).collect();
        Handle { workers: workers.collect(), cpus, supervisor, disk: self.disk, holds }
    }
}

impl Handle {
    /// Counters since start.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let DeviceSupervisor { recoveries, aborts, .. } = &*self.supervisor;
        let mut sum = Statistics { recoveries: count(recoveries), aborts: count(aborts), ..Statistics::default() };
        self.workers.iter().for_each(|(_, counters)| counters.add_to(&mut sum));
        sum
    }

    /// The same by worker.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerReport> {
        let count = self.workers.len();
        let report = |(worker, (_, counters)): (usize, &(Arc<CommandQueue>, Arc<Counters>))| {
            let mut statistics = Statistics::default();
            counters.add_to(&mut statistics);
            let mut latencies = std::array::from_fn(|_| LatencySummary::default());
            counters.latencies.add_to(&mut latencies);
            let rings = counters.rings.iter().enumerate().map(|(slot, ring)| RingStatistics {
                virtqueue: slot * count + worker,
                completed: ring.completed.get(),
                in_flight: ring.in_flight.get(),
            });
            WorkerReport { statistics, cpus: self.cpus[worker], rings: rings.collect(), latencies }
        };
        self.workers.iter().enumerate().map(report).collect()
    }

    /// Whether the device serves requests. Does not wait for a reset.
    #[must_use]
    pub fn device_state(&self) -> DeviceState {
        self.supervisor.device_state()
    }

    /// The current geometry of the disk.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.supervisor.geometry(self.disk)
    }

    /// Measures how long requests take, or no longer. What was measured stays.
    pub fn measure(&self, on: bool) {
        self.workers.iter().for_each(|(queue, _)| queue.push(WorkerCommand::Measure(on)));
    }

    /// See [`Engine::hold`].
    ///
    /// # Errors
    /// As there.
    pub fn hold(&self, limit: Duration) -> Result<Held, EngineError> {
        if self.supervisor.is_known_to_be_down() {
            return Err(EngineError::Away);
        }
        self.holds.hold(self.workers.iter().map(|(queue, _)| Arc::clone(queue)).collect(), limit)
    }

    /// Resets the device. Requests in flight are submitted again.
    ///
    /// # Errors
    /// The device is not up, or does not come back.
    pub fn reset_device(&self) -> anyhow::Result<()> {
        self.supervisor.reset_on_request()
    }

    /// What the device says of itself. Waits for a reset.
    ///
    /// # Errors
    /// There is no device that could be asked.
    pub fn identify(&self) -> anyhow::Result<Identification> {
        self.supervisor.ask(|driver| driver.identification(self.disk))
    }

    /// Asks the device for its health. Waits for a reset.
    ///
    /// # Errors
    /// The device is not up, or does not answer.
    pub fn health(&self) -> anyhow::Result<Health> {
        self.supervisor.ask(|driver| driver.health())
    }
}
