//! Counters. Each worker writes only its own, so counting takes a plain load and store. Readers add them up and may see
//! slightly old values.

use std::fmt;

use serde::Serialize;

use super::counter::Counter;
use super::latency::Latencies;

/// Counters since start, summed over workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Statistics {
    /// Read requests that the device has completed.
    pub reads: u64,
    /// Write requests that the device has completed.
    pub writes: u64,
    /// Flush requests that the device has completed.
    pub flushes: u64,
    /// Discard requests that the device has completed.
    pub discards: u64,
    /// Write-zeroes requests that the device has completed.
    pub write_zeroes: u64,
    /// Reports of zones, and changes of their states, that the device has completed.
    pub zones: u64,
    /// Bytes read successfully.
    pub bytes_read: u64,
    /// Bytes written successfully.
    pub bytes_written: u64,
    /// Commands that describe their data by an SGL, because PRPs cannot.
    pub sgl: u64,
    /// Commands whose data went through a bounce buffer.
    pub bounced: u64,
    /// Requests that ended in an error, whatever the cause.
    pub errors: u64,
    /// Kicks that woke a worker.
    pub kicks: u64,
    /// Notifications sent to a driver.
    pub calls: u64,
    /// Doorbells written.
    pub doorbells: u64,
    /// Bytes whose cache lines were flushed around requests; 0 under a coherent verdict.
    pub flushed_bytes: u64,
    /// Time spent on these flushes, nanoseconds.
    pub flush_nanoseconds: u64,
    /// Commands that were aborted because they took too long.
    pub aborts: u64,
    /// Requests submitted again after a device reset, or for the process before this one.
    pub resubmitted: u64,
    /// Device resets because of overdue commands or a failed device.
    pub recoveries: u64,
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reads={} writes={} flushes={} ", self.reads, self.writes, self.flushes)?;
        write!(f, "discards={} write_zeroes={} zones={} ", self.discards, self.write_zeroes, self.zones)?;
        write!(f, "bytes_read={} bytes_written={} ", self.bytes_read, self.bytes_written)?;
        write!(f, "sgl={} bounced={} ", self.sgl, self.bounced)?;
        write!(f, "errors={} kicks={} calls={} ", self.errors, self.kicks, self.calls)?;
        write!(f, "doorbells={} aborts={} ", self.doorbells, self.aborts)?;
        write!(f, "recoveries={} resubmitted={} ", self.recoveries, self.resubmitted)?;
        write!(f, "flushed_bytes={} flush_us={}", self.flushed_bytes, self.flush_nanoseconds / 1000)
    }
}

/// What one worker has counted of one virtqueue. It is written once for each batch of used entries, and before the worker sleeps.
/// On cache lines of its own, as [`Counters`].
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct RingCounters {
    pub(super) completed: Counter,
    pub(super) in_flight: Counter,
}

/// The counters of one virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RingStatistics {
    /// Index of the virtqueue.
    pub virtqueue: usize,
    /// Requests that have a used entry.
    pub completed: u64,
    /// Requests taken and not yet completed.
    pub in_flight: u64,
}

/// One worker's counters, on cache lines of their own (two, because x86 fetches lines in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub(super) reads: Counter,
    pub(super) writes: Counter,
    pub(super) flushes: Counter,
    pub(super) discards: Counter,
    pub(super) write_zeroes: Counter,
    pub(super) zones: Counter,
    pub(super) bytes_read: Counter,
    pub(super) bytes_written: Counter,
    pub(super) sgl: Counter,
    pub(super) bounced: Counter,
    pub(super) errors: Counter,
    pub(super) kicks: Counter,
    pub(super) calls: Counter,
    pub(super) doorbells: Counter,
    pub(super) resubmitted: Counter,
    pub(super) flushed_bytes: Counter,
    pub(super) flush_nanoseconds: Counter,
    /// By the slot of the worker.
    pub(super) rings: Box<[RingCounters]>,
    pub(super) latencies: Latencies,
}

impl Counters {
    /// The counters of a worker with this number of slots.
    pub(super) fn new(slots: usize) -> Self {
        Self { rings: std::iter::repeat_with(RingCounters::default).take(slots).collect(), ..Self::default() }
    }

    /// Adds these to `sum`.
    pub(super) fn add_to(&self, sum: &mut Statistics) {
        sum.reads += self.reads.get();
        sum.writes += self.writes.get();
        sum.flushes += self.flushes.get();
        sum.discards += self.discards.get();
        sum.write_zeroes += self.write_zeroes.get();
        sum.zones += self.zones.get();
        sum.bytes_read += self.bytes_read.get();
        sum.bytes_written += self.bytes_written.get();
        sum.sgl += self.sgl.get();
        sum.bounced += self.bounced.get();
        sum.errors += self.errors.get();
        sum.kicks += self.kicks.get();
        sum.calls += self.calls.get();
        sum.doorbells += self.doorbells.get();
        sum.resubmitted += self.resubmitted.get();
        sum.flushed_bytes += self.flushed_bytes.get();
        sum.flush_nanoseconds += self.flush_nanoseconds.get();
    }
}
