//! A second process of this program, for what the first one gives up the right to do.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Forks. The child runs `run` with `keep`, which is its only descriptor beside the standard ones, and then ends; standard input is
/// `/dev/null`, or closed where there is none. Returns the child's process id.
///
/// # Errors
/// The errno of `fork`; [`io::ErrorKind::ResourceBusy`] if this process has more than one thread.
pub fn fork(keep: OwnedFd, run: impl FnOnce(OwnedFd)) -> io::Result<u32> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() != 1) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    // SAFETY: this is the only thread, as the count above shows wherever there is procfs, and the caller starts threads later. So
    // no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        0 => {
            close_others(keep.as_raw_fd());
            run(keep);
            // SAFETY: `_exit` ends the child without running what the parent has registered for its own end, and without dropping
            // owners of descriptors that were closed above.
            unsafe { libc::_exit(0) }
        }
        pid => u32::try_from(pid).map_err(|_| io::Error::last_os_error()),
    }
}

/// Closes what the child must not hold: a device's file would keep the device bound when the parent has ended.
fn close_others(keep: RawFd) {
    let keep = keep.unsigned_abs();
    // Before the descriptors are closed, because standard input may be one of the parent's sockets.
    match std::fs::File::open("/dev/null") {
        // SAFETY: `dup2` replaces the child's standard input, which nobody in the child uses.
        Ok(null) => drop(unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) }),
        // SAFETY: as above.
        Err(_) => drop(unsafe { libc::close(libc::STDIN_FILENO) }),
    }
    let (first, last) = (libc::STDERR_FILENO.unsigned_abs() + 1, u32::MAX);
    for (from, to) in [(first, keep.saturating_sub(1)), (keep.max(first - 1) + 1, last)] {
        if from <= to {
            // SAFETY: their owners are in the parent's stack frames, which the child never returns to.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use testbed::own_process::in_own_process;

    #[test]
    fn a_process_with_several_threads_does_not_fork() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        // The test itself is a second thread.
        assert_eq!(fork(theirs.into(), drop).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    }

    #[test]
    fn the_child_keeps_one_descriptor_and_no_other() {
        if !in_own_process("sys::fork::tests::the_child_keeps_one_descriptor_and_no_other") {
            return;
        }
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let keep = theirs.as_raw_fd().unsigned_abs();
        // SAFETY: the child only writes to a socket that it has. The test harness holds no lock that it needs.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            close_others(keep.cast_signed());
            // SAFETY: the descriptor stays open in the child, which does not drop its owner.
            let mut kept = unsafe {
                File::from(std::os::fd::BorrowedFd::borrow_raw(keep.cast_signed()).try_clone_to_owned().unwrap())
            };
            let _ = kept.write_all(b"here");
            // It lives as long as the parent looks.
            let _ = kept.read(&mut [0; 1]);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) }
        }
        drop((theirs, writer));

        let mut text = [0; 4];
        ours.read_exact(&mut text).unwrap();
        let end = rustix::io::read(reader.as_fd(), &mut [0; 1]);
        // A child with all descriptors would never see the parent's end.
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();

        assert_eq!((&text, end), (b"here", Ok(0)), "the pipe has no writer any more; with one it would be EAGAIN");
    }
}
