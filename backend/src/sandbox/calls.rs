//! The system calls that each kind of thread may make, with what their arguments must be. A call that is in no list of a role ends
//! the process.
//!
//! All calls that act on descriptors which the thread has already are in [`EVERY`]: the descriptors are the right.

use super::Role;

/// A call, and a condition on one of its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) condition: Option<Condition>,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Argument `.0` is one of these.
    OneOf(u8, &'static [u64]),
    /// Argument `.0` has none of the bits of `.1`.
    Without(u8, u64),
    /// Argument `.0` has all of the bits of `.1`.
    With(u8, u64),
    /// Argument `.0` is the number of this process.
    ThisProcess(u8),
}

use Condition::{OneOf, ThisProcess, With, Without};

const fn any(number: i64) -> Call {
    Call { number, condition: None }
}

const fn only(number: i64, condition: Condition) -> Call {
    Call { number, condition: Some(condition) }
}

const fn bits(number: i32) -> u64 {
    number.cast_unsigned() as u64
}

/// Nobody maps executable memory, or makes memory executable.
const NOT_EXECUTABLE: Condition = Without(2, bits(libc::PROT_EXEC));

/// Of all threads: memory without PROT_EXEC, waiting, the clock, signals to itself, and open descriptors.
const EVERY: &[Call] = &[
    // Memory.
    any(libc::SYS_brk),
    any(libc::SYS_madvise),
    only(libc::SYS_mmap, NOT_EXECUTABLE),
    only(libc::SYS_mprotect, NOT_EXECUTABLE),
    any(libc::SYS_mremap),
    any(libc::SYS_munmap),
    // Waiting.
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_pwait2),
    any(libc::SYS_futex),
    any(libc::SYS_gettimeofday),
    any(libc::SYS_nanosleep),
    any(libc::SYS_ppoll),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_sched_yield),
    any(libc::SYS_timerfd_settime),
    // Open descriptors.
    any(libc::SYS_close),
    any(libc::SYS_fallocate),
    only(libc::SYS_fcntl, OneOf(1, FCNTL)),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fstat),
    any(libc::SYS_fsync),
    any(libc::SYS_ftruncate),
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_read),
    any(libc::SYS_readv),
    any(libc::SYS_write),
    any(libc::SYS_writev),
    // The thread itself: its start, its end, a violation, a panic.
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
    any(libc::SYS_getpid),
    any(libc::SYS_getrandom),
    any(libc::SYS_gettid),
    only(libc::SYS_prctl, OneOf(0, PRCTL)),
    any(libc::SYS_rseq),
    only(libc::SYS_rt_sigaction, OneOf(0, SIGNALS)),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_sigaltstack),
    only(libc::SYS_tgkill, ThisProcess(0)),
];

/// The same on x86-64, where C libraries use the older forms.
#[cfg(target_arch = "x86_64")]
const EVERY_X86: &[Call] = &[any(libc::SYS_epoll_wait), any(libc::SYS_poll)];
#[cfg(not(target_arch = "x86_64"))]
const EVERY_X86: &[Call] = &[];

const FCNTL: &[u64] = &[
    bits(libc::F_DUPFD_CLOEXEC),
    bits(libc::F_GETFD),
    bits(libc::F_SETFD),
    bits(libc::F_GETFL),
    bits(libc::F_SETFL),
    bits(libc::F_GET_SEALS),
    bits(libc::F_ADD_SEALS),
];
/// Names of threads, and of anonymous memory (glibc).
const PRCTL: &[u64] = &[bits(libc::PR_GET_NAME), bits(libc::PR_SET_NAME), 0x5356_4d41];
/// Their handlers set the default action; `abort` that of SIGABRT. The last one is glibc's own (SIGSETXID), whose handler is set
/// when the first thread is started: with a whole function that is the first flush of memory.
const SIGNALS: &[u64] = &[bits(libc::SIGBUS), bits(libc::SIGSYS), bits(libc::SIGABRT), bits(libc::SIGSEGV), 33];

/// `VFIO_DEVICE_SET_IRQS`: unmasks INTx.
const WORKER_IOCTLS: &[u64] = &[vfio(10)];
/// Of a worker: nothing but that.
const WORKER: &[Call] = &[only(libc::SYS_ioctl, OneOf(1, WORKER_IOCTLS))];

/// Of a thread that emulates a drive: the size of the file behind it, which may grow (`File::metadata`).
const EMULATION: &[Call] = &[any(libc::SYS_statx)];

/// `_IO(';', 100 + number)` (linux/vfio.h).
const fn vfio(number: u64) -> u64 {
    (b';' as u64) << 8 | (100 + number)
}

/// `_IO(';', number)` (linux/iommufd.h, `enum` IOMMUFD_CMD_*).
const fn iommufd(number: u32) -> u64 {
    (b';' as u64) << 8 | number as u64
}

/// What acquires, resets and releases a function.
const DEVICE_IOCTLS: &[u64] = &[
    // Containers and groups: from VFIO_GET_API_VERSION to VFIO_GROUP_GET_DEVICE_FD.
    vfio(0),
    vfio(1),
    vfio(2),
    vfio(3),
    vfio(4),
    vfio(5),
    vfio(6),
    // Devices: GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, RESET; IOMMU_GET_INFO, MAP_DMA and UNMAP_DMA.
    vfio(7),
    vfio(8),
    vfio(9),
    vfio(10),
    vfio(11),
    vfio(12),
    vfio(13),
    vfio(14),
    // VFIO_DEVICE_FEATURE, BIND_IOMMUFD, ATTACH_IOMMUFD_PT, DETACH_IOMMUFD_PT.
    vfio(17),
    vfio(18),
    vfio(19),
    vfio(20),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_DESTROY),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_ALLOC),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_COPY),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_MAP),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_MAP_FILE),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_UNMAP),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_IOAS_CHANGE_PROCESS),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_VFIO_IOAS),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_HWPT_ALLOC),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING),
    iommufd(iommufd_bindings::iommufd::IOMMUFD_CMD_GET_HW_INFO),
    // FIONBIO, with which the standard library makes a socket non-blocking; FIONREAD: how many bytes wait in one.
    0x5421,
    0x541b,
];

/// Of those who handle the device, clients or front-ends: reads of what landlock allows, messages over sockets, threads.
const GUARD: &[Call] = &[
    only(libc::SYS_ioctl, OneOf(1, DEVICE_IOCTLS)),
    // Threads. A process would need another flag, and `clone3` answers ENOSYS, because its flags are in memory.
    only(libc::SYS_clone, With(0, bits(libc::CLONE_THREAD))),
    any(libc::SYS_clone3),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_eventfd2),
    any(libc::SYS_memfd_create),
    any(libc::SYS_pipe2),
    any(libc::SYS_timerfd_create),
    any(libc::SYS_capget),
    any(libc::SYS_getuid),
    any(libc::SYS_geteuid),
    any(libc::SYS_getegid),
    any(libc::SYS_uname),
    any(libc::SYS_sysinfo),
    only(libc::SYS_kill, ThisProcess(0)),
    only(libc::SYS_prlimit64, OneOf(2, &[0])),
    // Files, as far as landlock allows.
    any(libc::SYS_faccessat),
    any(libc::SYS_faccessat2),
    any(libc::SYS_getdents64),
    any(libc::SYS_newfstatat),
    any(libc::SYS_openat),
    any(libc::SYS_readlinkat),
    any(libc::SYS_statx),
    any(libc::SYS_statfs),
    any(libc::SYS_fstatfs),
    any(libc::SYS_unlinkat),
    // Sockets.
    any(libc::SYS_accept4),
    any(libc::SYS_getpeername),
    any(libc::SYS_getsockname),
    any(libc::SYS_getsockopt),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_setsockopt),
    any(libc::SYS_shutdown),
    // Notifications to the service manager, which it connects anew each time.
    only(libc::SYS_socket, OneOf(0, FAMILIES)),
    any(libc::SYS_socketpair),
    any(libc::SYS_connect),
];

const FAMILIES: &[u64] = &[bits(libc::AF_UNIX), bits(libc::AF_INET), bits(libc::AF_INET6)];

/// The same on x86-64, where C libraries use the older forms.
#[cfg(target_arch = "x86_64")]
const GUARD_X86: &[Call] =
    &[any(libc::SYS_access), any(libc::SYS_lstat), any(libc::SYS_readlink), any(libc::SYS_stat), any(libc::SYS_unlink)];
#[cfg(not(target_arch = "x86_64"))]
const GUARD_X86: &[Call] = &[];

/// Of the control thread alone: sockets in place of those of a predecessor, and the end of a successor.
const CONTROL: &[Call] = &[
    any(libc::SYS_bind),
    any(libc::SYS_dup3),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchownat),
    any(libc::SYS_listen),
    any(libc::SYS_pidfd_open),
    any(libc::SYS_pidfd_send_signal),
    any(libc::SYS_renameat),
    any(libc::SYS_renameat2),
    any(libc::SYS_signalfd4),
    any(libc::SYS_umask),
    any(libc::SYS_wait4),
    any(libc::SYS_waitid),
];

#[cfg(target_arch = "x86_64")]
const CONTROL_X86: &[Call] = &[any(libc::SYS_rename), any(libc::SYS_lchown), any(libc::SYS_dup2)];
#[cfg(not(target_arch = "x86_64"))]
const CONTROL_X86: &[Call] = &[];

/// All calls of a role.
pub(super) fn of_role(role: Role) -> impl Iterator<Item = Call> {
    let lists: &[&[Call]] = match role {
        Role::Worker => &[WORKER],
        Role::Emulation => &[EMULATION],
        Role::Guard => &[GUARD, GUARD_X86],
        Role::Control => &[GUARD, GUARD_X86, CONTROL, CONTROL_X86],
    };
    [EVERY, EVERY_X86].into_iter().chain(lists.iter().copied()).flatten().copied()
}
