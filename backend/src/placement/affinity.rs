//! The affinity of the calling thread (sched_setaffinity(2)).

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::CpuList;

/// The CPUs on which this thread may run. Threads that it starts inherit them.
///
/// # Errors
/// The machine can have more CPUs than [`CpuList::LIMIT`].
pub fn own() -> io::Result<CpuList> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuList::LIMIT).filter(|&cpu| set.is_set(cpu)).collect())
}

/// Has this thread run on `cpus` only.
///
/// # Errors
/// None of them can be used, or a filter of system calls forbids it.
pub fn run_on(cpus: &CpuList) -> io::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(cpu));
    Ok(sched_setaffinity(None, &set)?)
}

/// The same for a thread that goes on where it is if that fails, after a line in the log.
pub fn place(cpus: &CpuList) {
    if let Err(error) = run_on(cpus) {
        let thread = std::thread::current();
        log::warn!("{}: not moved to CPUs {cpus}: sched_setaffinity: {error}", thread.name().unwrap_or("worker"));
    }
}

/// The CPUs to which the kernel would let this thread change. It changes to all of them for a moment: a cpuset cannot be read
/// in every container.
///
/// # Errors
/// As for [`own`] and [`run_on`].
pub fn permitted() -> io::Result<CpuList> {
    let before = own()?;
    run_on(&CpuList::ALL)?;
    let permitted = own();
    run_on(&before)?;
    permitted
}
