//! What a vring's used ring is logged as, while dirty pages are logged.

use super::{Complete, Running, Setup, State, Vring};
use crate::addr::{Address, Gpa};
use crate::engine::{Engine, Layout};
use crate::memory::DirtyLog;
use crate::vhost_user::Error;
use crate::vhost_user::dirty_log::check_room;

impl Vring {
    /// True if the vring runs, or lacks only memory or a log.
    pub(in super::super) fn is_set_up(&self) -> bool {
        !matches!(self.state, State::Setup(_))
    }

    /// SET_VRING_ADDR: the address as which the first byte of the used ring is logged; `None` if it is not. It need not be guest
    /// memory. `log` is the one in use.
    pub(in super::super) fn set_used_log(
        &mut self,
        engine: &Engine,
        used_log: Option<Gpa>,
        (log, layout): (Option<&DirtyLog>, Option<Layout>),
    ) -> Result<(), Error> {
        let before = std::mem::replace(&mut self.used_log, used_log);
        if let Some(Err(error)) = log.map(|log| self.check_log(log, layout)) {
            self.used_log = before;
            return Err(error);
        }
        if self.is_running() && before != used_log {
            engine.set_used_log(self.index, used_log);
        }
        Ok(())
    }

    /// Checks that `log` has room for the used ring, if its size is known.
    pub(in super::super) fn check_log(&self, log: &DirtyLog, layout: Option<Layout>) -> Result<(), Error> {
        let size = match &self.state {
            State::Setup(Setup { size, .. }) => *size,
            State::Complete(Complete { size, .. })
            | State::Running(Running { complete: Complete { size, .. }, .. }) => Some(*size),
        };
        let Some((start, size)) = self.used_log.zip(size) else { return Ok(()) };
        let [.., used] = layout.unwrap_or(Layout::Split).areas(size, true);
        let last = start.checked_add(used.bytes - 1).unwrap_or(Gpa(u64::MAX));
        let what = || format!("virtqueue {}: its {}, logged at {start},", self.index, used.name);
        Ok(check_room(log, what, last)?)
    }
}
