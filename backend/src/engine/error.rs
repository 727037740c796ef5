//! Errors of starting, stopping and changing the engine or a vring.

use std::io;

use super::virtqueue::layout::Layout;
use crate::addr::{Gpa, Span};
use crate::hardware::MapError;

/// An error of starting, stopping or changing the engine or a ring.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The driver has no queues.
    #[error("the device has no queue to serve virtqueues with")]
    NoQueues,
    /// The virtqueue does not exist.
    #[error("virtqueue {index} of {rings}: no such virtqueue")]
    NoSuchRing {
        /// Requested index.
        index: usize,
        /// Number of virtqueues.
        rings: usize,
    },
    /// The ring is started already.
    #[error("virtqueue {0}: already running; stop it first (GET_VRING_BASE)")]
    RingRunning(usize),
    /// The ring size is not supported.
    #[error("virtqueue {index}: the size of a {layout} ring is {}, not {size}", layout.sizes())]
    RingSize {
        /// Index of the virtqueue.
        index: usize,
        /// Requested size.
        size: u16,
        /// Split or packed.
        layout: Layout,
    },
    /// The base is not a position in the ring.
    #[error("virtqueue {index}: base {base:#x} is not a position in a ring of {size} descriptors")]
    RingBase {
        /// Index of the virtqueue.
        index: usize,
        /// Number of descriptors.
        size: u16,
        /// Requested base.
        base: u32,
    },
    /// An area is too short, misaligned, or not in one region of guest memory.
    #[error("virtqueue {index}: {name} at {span}: needs {bytes} bytes in one memory region, aligned to {alignment}")]
    RingArea {
        /// Index of the virtqueue.
        index: usize,
        /// Name of the area.
        name: &'static str,
        /// Requested address and length.
        span: Span<Gpa>,
        /// Required length, bytes.
        bytes: u64,
        /// Required alignment, bytes.
        alignment: u64,
    },
    /// The kick eventfd cannot be polled.
    #[error("virtqueue {index}: watch its kick eventfd: {source}")]
    Kick {
        /// Index of the virtqueue.
        index: usize,
        /// The system error.
        source: io::Error,
    },
    /// The bounce buffer could not be allocated or mapped.
    #[error("bounce buffer of worker {worker}: {source}")]
    Bounce {
        /// Number of the worker.
        worker: usize,
        /// The cause.
        source: MapError,
    },
    /// A worker could not be started.
    #[error("start worker {worker}: {source}")]
    Start {
        /// Number of the worker.
        worker: usize,
        /// The system error.
        source: io::Error,
    },
    /// The watchdog could not be started.
    #[error("start the watchdog: {0}")]
    Watchdog(
        /// The system error.
        #[source]
        io::Error,
    ),
    /// The write cache could not be switched.
    #[error("switch the write cache {}: {source:#}", if *.on { "on" } else { "off" })]
    WriteCache {
        /// Requested state.
        on: bool,
        /// The cause.
        source: anyhow::Error,
    },
    /// Requests in flight did not complete in time.
    #[error("requests in flight have not completed within {0:?}: the drive is slow, or is being reset")]
    Busy(std::time::Duration),
    /// The device is down.
    #[error("the drive is away or does not answer, so it cannot be handed over; try again when it is back")]
    Away,
    /// A worker thread has panicked; the panic message is in the log.
    #[error("worker {0} has ended")]
    WorkerGone(usize),
}
