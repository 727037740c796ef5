//! Stops a test at a store to shared memory, as if the process were killed there. What it has stored before remains.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores that this thread may still make; `None` outside [`killed_after`].
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The payload of the panic.
struct Killed;

/// Runs `process`, which is killed when it makes one store more than `stores`. `None` if it has been.
pub(crate) fn killed_after<T>(stores: usize, process: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(Some(stores));
    let result = catch_unwind(AssertUnwindSafe(process));
    LEFT.set(None);
    match result {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// Called before each store.
pub(super) fn before_store() {
    match LEFT.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Killed)),
        Some(left) => LEFT.set(Some(left - 1)),
    }
}
