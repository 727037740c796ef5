//! The successor as a process. It is ended before the predecessor goes on, because it may have started the controller, and holds
//! descriptors of it. It is known by a pidfd, so no other process is ended in its place.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Child;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Time for a killed process to be gone. A system call that cannot be interrupted delays it.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The successor's process.
#[derive(Debug)]
pub struct SuccessorProcess {
    pid: u32,
    pidfd: OwnedFd,
    child: Option<Child>,
}

impl SuccessorProcess {
    /// A process that has connected by itself.
    ///
    /// # Errors
    /// It cannot be seen from here, or is gone.
    pub(super) fn of_peer(pid: Option<u32>) -> io::Result<Self> {
        let pid = pid.ok_or_else(|| io::Error::other("its process is not visible from here"))?;
        Ok(Self { pid, pidfd: open(pid)?, child: None })
    }

    /// A child of this process.
    ///
    /// # Errors
    /// The errno of `pidfd_open`.
    pub(super) fn of_child(child: Child) -> io::Result<Self> {
        Ok(Self { pid: child.id(), pidfd: open(child.id())?, child: Some(child) })
    }

    /// A process that another one has started, and waits for.
    pub(super) fn of_pidfd(pid: u32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, child: None }
    }

    /// Its pidfd, for another process.
    ///
    /// # Errors
    /// The errno of `fcntl`.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it, and waits until it is gone. False if it is not.
    pub(super) fn end(&mut self) -> bool {
        // ESRCH: it is gone already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let gone = self.wait_for_end();
        if gone && let Some(child) = &mut self.child {
            let _ = child.wait();
        }
        gone
    }

    fn wait_for_end(&self) -> bool {
        let time = Timespec { tv_sec: END_LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
        loop {
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&time)) {
                Err(Errno::INTR) => {}
                other => return other == Ok(1),
            }
        }
    }
}

/// A child that has not been ended ends by itself, and is reaped then.
impl Drop for SuccessorProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take()
            && !matches!(child.try_wait(), Ok(Some(_)))
        {
            let reaper = std::thread::Builder::new().name("reaper".to_owned());
            // Without the thread the child stays a zombie until this process ends.
            drop(reaper.spawn(move || child.wait()));
        }
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_is_ended_and_reaped() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let mut process = SuccessorProcess::of_child(child).unwrap();

        assert!(process.end());

        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        assert!(process.end(), "once more is no error");
    }

    #[test]
    fn a_process_that_is_not_visible_is_refused() {
        assert!(SuccessorProcess::of_peer(None).is_err());
    }
}
