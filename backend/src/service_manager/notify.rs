//! Messages to the service manager (sd_notify(3)). Without one they go nowhere.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sd_notify::NotifyState;

/// How long the service manager may take to confirm.
const BARRIER_LIMIT: Duration = Duration::from_secs(5);

/// Front-ends can connect.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// What this process does now, as one line for people.
pub fn status(line: &str) {
    send(&[NotifyState::Status(line)]);
}

/// The control thread is alive.
pub(super) fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// This process ends.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Process `pid` serves from now on. Returns when the manager knows it: a message can be lost if its sender has ended before it is
/// handled, and then the manager takes the end of this process for that of the service.
pub fn main_pid(pid: u32) {
    send(&[NotifyState::MainPid(pid)]);
    if let Err(error) = barrier() {
        log::warn!("the service manager has not confirmed that process {pid} serves: {error}");
    }
}

fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::warn!("notify the service manager: {error}");
    }
}

/// Stores `fd` as `name`. The manager keeps it even if the other end hangs up, so that names and descriptors stay together.
pub(super) fn store(name: &str, fd: &OwnedFd) -> io::Result<()> {
    let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    sd_notify::notify_with_fds(&state, &[fd.as_fd()])
}

/// Removes what is stored as `name`.
pub(super) fn remove(name: &str) -> io::Result<()> {
    sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
}

/// Waits until the manager has handled all messages before. It cannot do that for a process that has ended.
pub(super) fn barrier() -> io::Result<()> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[writer.as_fd()])?;
    drop(writer);
    let time = Timespec::try_from(BARRIER_LIMIT).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&time))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
