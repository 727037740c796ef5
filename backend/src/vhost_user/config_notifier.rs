//! Tells a server's control thread of a change of the configuration space.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Reports a change of the configuration space to a server's control thread, from any thread.
#[derive(Clone)]
pub struct ConfigNotifier {
    pub(super) config_change: Arc<OwnedFd>,
}

impl ConfigNotifier {
    /// The configuration space has changed, for example the capacity. The current front-end, if any, is notified.
    pub fn config_changed(&self) {
        // EAGAIN means that the counter is full, so the server has not read it yet.
        let _ = rustix::io::write(&*self.config_change, &1_u64.to_ne_bytes());
    }
}
