//! Why the engine, or a vring, could not be started or stopped.

use std::io;

use super::virtqueue::layout::Layout;
use crate::addr::{Gpa, Span};
use crate::hardware::MapError;

/// Why the engine, or a ring, could not be started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The driver has no queues to give.
    #[error("the device has no queue to serve virtqueues with")]
    NoQueues,
    /// The virtqueue does not exist.
    #[error("virtqueue {index} of {rings}: no such virtqueue")]
    NoSuchRing {
        /// Asked for.
        index: usize,
        /// Number offered.
        rings: usize,
    },
    /// The virtqueue is being served already.
    #[error("virtqueue {0}: running already; stop it first (GET_VRING_BASE)")]
    RingRunning(usize),
    /// Not a size this device serves.
    #[error("virtqueue {index}: the size of a {layout} ring is {}, not {size}", layout.sizes())]
    RingSize {
        /// Which virtqueue.
        index: usize,
        /// Asked for.
        size: u16,
        /// Split or packed.
        layout: Layout,
    },
    /// A place to go on that the ring does not have.
    #[error("virtqueue {index}: base {base:#x} is no place in a ring of {size}")]
    RingBase {
        /// Which virtqueue.
        index: usize,
        /// Number of descriptors.
        size: u16,
        /// Asked for.
        base: u32,
    },
    /// An area is too short, misaligned, or not in one region of guest memory.
    #[error("virtqueue {index}: {name} at {span}: needs {bytes} bytes in one memory region, aligned to {alignment}")]
    RingArea {
        /// Which virtqueue.
        index: usize,
        /// Which area.
        name: &'static str,
        /// Where it was said to be.
        span: Span<Gpa>,
        /// Bytes needed.
        bytes: u64,
        /// Alignment needed, bytes.
        alignment: u64,
    },
    /// The kick eventfd cannot be waited for.
    #[error("virtqueue {index}: watch its kick eventfd: {source}")]
    Kick {
        /// Which virtqueue.
        index: usize,
        /// The errno.
        source: io::Error,
    },
    /// No memory for bounce buffers.
    #[error("bounce buffer of worker {worker}: {source}")]
    Bounce {
        /// Which worker.
        worker: usize,
        /// Why.
        source: MapError,
    },
    /// A worker could not be started.
    #[error("start worker {worker}: {source}")]
    Start {
        /// Which worker.
        worker: usize,
        /// The errno.
        source: io::Error,
    },
    /// The watchdog could not be started.
    #[error("start the watchdog: {0}")]
    Watchdog(
        /// The errno.
        #[source]
        io::Error,
    ),
    /// The write cache cannot be switched.
    #[error("switch the write cache {}: {source:#}", if *.on { "on" } else { "off" })]
    WriteCache {
        /// To which state.
        on: bool,
        /// Why not.
        source: anyhow::Error,
    },
    /// A worker has ended by a bug; its log line tells where.
    #[error("worker {0} has ended")]
    WorkerGone(usize),
}
