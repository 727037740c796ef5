//! Who may still hold a descriptor of the function. A front-end that was given one to map BARs keeps it for as long as it
//! likes: neither a reset nor the end of its conversation takes it back. Until its process has ended nobody else is served,
//! for it could reach the registers of a function that another virtual machine uses.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process that may hold a descriptor.
pub(super) struct Holder {
    pid: u32,
    /// Readable once the process has ended; `None` where it had ended already.
    process: Option<OwnedFd>,
}

impl Holder {
    /// The process `pid`, as it is now.
    pub(super) fn new(pid: u32) -> Self {
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        Self { pid, process: process.and_then(Result::ok) }
    }

    /// The process's id.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// True if the function may be given to process `newcomer`: to the holder itself, or when the holder has ended.
    pub(super) fn admits(&self, newcomer: Option<u32>) -> bool {
        newcomer == Some(self.pid) || self.has_ended()
    }

    fn has_ended(&self) -> bool {
        let Some(process) = &self.process else { return true };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 1)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn nobody_else_is_admitted_until_the_holder_has_ended() {
        let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
        let holder = Holder::new(process.id());

        assert!(!holder.admits(Some(1)) && !holder.admits(None));
        assert!(holder.admits(Some(process.id())), "the holder itself may come again");
        process.kill().unwrap();
        process.wait().unwrap();

        assert!(holder.admits(Some(1)) && holder.admits(None));
        assert!(Holder::new(process.id()).admits(Some(1)), "one that had ended before");
    }
}
