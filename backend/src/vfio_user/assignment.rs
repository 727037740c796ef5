//! Assigns the function to a front-end. A former front-end that was given the device's own file may still have it, and the
//! kernel lets nobody bind the function until it has closed the file. A process that has just been killed takes a moment to
//! end, so the attempt is repeated for a short time.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::passthrough::{Assignment, Passthrough, PassthroughError};

/// How long a front-end waits for a former one to close the device's file. QEMU waits 5 s for an answer (`x-msg-timeout`).
const HELD_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two attempts.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Assigns `device`. Ends early when `stop` is readable.
pub(super) fn assign<'d>(device: &'d Passthrough, stop: BorrowedFd<'_>) -> Result<Assignment<'d>, PassthroughError> {
    let start = Instant::now();
    loop {
        let result = device.assign();
        let held = matches!(result, Err(PassthroughError::Held { .. }));
        if !held || start.elapsed() >= HELD_TIMEOUT || is_readable_after_pause(stop) {
            return result;
        }
    }
}

/// True as soon as `stop` is readable; false after [`PAUSE`].
fn is_readable_after_pause(stop: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::from_borrowed_fd(stop, PollFlags::IN)], Some(&PAUSE)).is_ok_and(|ready| ready == 1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::coherency::Policy;
    use crate::emulated::{EmulatedCdev, Machine, Options};
    use crate::passthrough::{BarAccess, ReacquireError};

    #[test]
    fn a_stop_ends_the_wait_for_a_file_that_is_held() {
        let machine = Machine::new(Options { size: 1 << 20, ..Options::default() }).unwrap();
        let cdev = EmulatedCdev::new(machine.whole_function(), true);
        let (facts, attempts) = (machine.facts(Policy::Suppress).unwrap(), Arc::new(AtomicU32::new(0)));
        let count = Arc::clone(&attempts);
        let device = Passthrough::new(cdev.bind().unwrap(), machine.space(), BarAccess::Direct, facts, false).unwrap();
        let device = device.with_reacquire(Box::new(move || {
            count.fetch_add(1, SeqCst);
            Err(ReacquireError::Held(anyhow::anyhow!("held")))
        }));
        let _file = device.assign().unwrap().regions.mmap(0).unwrap();
        let stop = eventfd(1, EventfdFlags::CLOEXEC).unwrap();

        let result = assign(&device, stop.as_fd());

        assert!(matches!(result, Err(PassthroughError::Held { .. })));
        assert_eq!(attempts.load(SeqCst), 1, "no further attempt");
    }
}
