//! The process that may still hold a descriptor of the function. A front-end that was given one to map BARs can keep it:
//! neither a reset nor the end of the connection revokes it. Until that process has ended, no other front-end is served,
//! because the process could access the registers of a function that another virtual machine uses.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process that may hold a descriptor.
pub(super) struct Holder {
    pid: u32,
    /// A pidfd, readable once the process has ended; `None` if it had ended before [`Self::new`].
    pidfd: Option<OwnedFd>,
}

impl Holder {
    /// The process that has the id `pid` now.
    pub(super) fn new(pid: u32) -> Self {
        let pidfd = i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        Self { pid, pidfd: pidfd.and_then(Result::ok) }
    }

    /// The process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// True if process `pid` may be served: it is the holder itself, or the holder has ended.
    pub(super) fn allows(&self, pid: Option<u32>) -> bool {
        pid == Some(self.pid) || self.has_ended()
    }

    fn has_ended(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return true };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 1)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn no_other_process_is_served_until_the_holder_has_ended() {
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        let holder = Holder::new(process.id());

        assert!(!holder.allows(Some(1)) && !holder.allows(None));
        assert!(holder.allows(Some(process.id())), "the holder itself may reconnect");
        process.kill().unwrap();
        process.wait().unwrap();

        assert!(holder.allows(Some(1)) && holder.allows(None));
        assert!(Holder::new(process.id()).allows(Some(1)), "a process that had ended before");
    }
}
