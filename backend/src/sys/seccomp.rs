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
