//! What the kernel has of seccomp.

/// `SECCOMP_GET_ACTION_AVAIL` (seccomp(2)).
const GET_ACTION_AVAIL: libc::c_uint = 2;

/// True if filters can answer a call with SIGSYS (`SECCOMP_RET_TRAP`).
#[must_use]
pub fn has_seccomp_trap() -> bool {
    let action: u32 = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads four bytes at `action`, which outlives the call.
    unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) == 0 }
}

/// Has all threads allocate from one arena. With several, glibc opens files when a thread first needs one, and when one shrinks
/// (`/sys/devices/system/cpu/online`, `/proc/sys/vm/overcommit_memory`), and a thread may not be allowed to by then. Nobody allocates
/// on the path of a request, so they do not wait for each other.
pub fn settle_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number in the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
