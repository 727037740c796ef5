//! The controller's thread in threaded mode.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;

use super::EmulatedError;
use super::controller::Controller;
use crate::sandbox::{Entry, Role};

/// The controller's thread; dropping it stops the thread.
pub(super) struct Worker {
    stop: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn start(controller: &Arc<Controller>) -> Result<Self, EmulatedError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (until, served) = (Arc::clone(&stop), Arc::clone(controller));
        let entry = Entry::new(Role::Emulation);
        let body = move || {
            entry.enter();
            while !until.load(SeqCst) {
                match served.run_all() {
                    None => std::thread::park(),
                    Some(due) => std::thread::park_timeout(due.saturating_sub(served.now())),
                }
            }
        };
        let handle =
            std::thread::Builder::new().name("emulated-nvme".to_owned()).spawn(body).map_err(EmulatedError::Thread)?;
        controller.thread.set(handle.thread().clone()).expect("a controller has one thread");
        Ok(Self { stop, handle: Some(handle) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(handle) = self.handle.take() {
            handle.thread().unpark();
            if handle.join().is_err() {
                log::error!("emulated function: the controller thread panicked");
            }
        }
    }
}
