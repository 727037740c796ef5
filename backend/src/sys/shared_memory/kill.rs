//! Stops a test at a store to shared memory, as if the process were killed there. What it has stored before remains.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores that this thread may still make; `None` outside [`killed_after`].
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// What [`before_each_store`] calls.
    static WATCHER: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
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

/// Runs `process`, and calls `watcher` before each of its stores. The watcher must not store to shared memory itself.
pub(crate) fn before_each_store(watcher: impl FnMut() + 'static, process: impl FnOnce()) {
    WATCHER.set(Some(Box::new(watcher)));
    process();
    WATCHER.set(None);
}

/// Called before each store.
pub(super) fn before_store() {
    WATCHER.with_borrow_mut(|watcher| watcher.iter_mut().for_each(|watcher| watcher()));
    match LEFT.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Killed)),
        Some(left) => LEFT.set(Some(left - 1)),
    }
}
