//! The primitives by which the engine's threads wait for each other. With the feature `shuttle`, a test chooses the order in
//! which threads proceed (`engine/tests/schedules.rs`); then these are shuttle's, and each is a place where another thread may
//! run.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    hint::spin_loop,
    sync::{Mutex, MutexGuard, atomic::AtomicBool, mpsc},
    thread,
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    hint::spin_loop,
    sync::{Mutex, MutexGuard, atomic::AtomicBool, mpsc},
    thread,
};

use std::time::Instant;

use mpsc::{Receiver, RecvTimeoutError};

/// Waits for a message until `deadline`.
///
/// # Errors
/// No message has come by then, or the sender is gone.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn recv_until<T>(receiver: &Receiver<T>, deadline: Instant) -> Result<T, RecvTimeoutError> {
    receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()))
}

/// The same, except that the deadline may pass at any time.
#[cfg(feature = "shuttle")]
pub(crate) fn recv_until<T>(receiver: &Receiver<T>, _: Instant) -> Result<T, RecvTimeoutError> {
    use shuttle::rand::{Rng, thread_rng};
    loop {
        match receiver.try_recv() {
            Ok(value) => return Ok(value),
            Err(mpsc::TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(mpsc::TryRecvError::Empty) if thread_rng().gen_ratio(1, 16) => return Err(RecvTimeoutError::Timeout),
            Err(mpsc::TryRecvError::Empty) => thread::yield_now(),
        }
    }
}
