//! The shim for a stock VMM: `LD_PRELOAD=libkvm_vfio_shim.so KVM_VFIO_SHIM_SOCKET=/run/vm1/kvm.sock qemu-system-x86_64 …`
//!
//! Four functions of libc stand here again. Each looks at its arguments, tells [`Vm`] or asks it, and makes the system call
//! that libc would have made: not libc's function, looked up by `dlsym`, as then a call before this library is initialised
//! would have nowhere to go. A hook allocates nothing, takes no lock where a vCPU runs, and cannot panic.
//!
//! | function | seen | done |
//! |---|---|---|
//! | `ioctl` | `KVM_RUN` | one compare; the time of the first is noted |
//! | | `KVM_CREATE_VM` | the VM is noted, the server's thread started |
//! | | `KVM_CREATE_DEVICE(VFIO)` | answered with the VM's one kvm-vfio device, whoever made it |
//! | `madvise` | `MADV_REMOVE` | nothing, while a device reaches guest memory |
//! | | `MADV_DONTFORK` | a VMM has guest memory: the server's thread is started (TCG makes no VM) |
//! | `fallocate`, `fallocate64` | a hole in a file | none in guest memory while a device reaches it, see [`guard`] |
//!
//! What QEMU's callers expect of a discard that does not happen: virtio-balloon and free-page reporting ignore the result, and
//! QEMU itself leaves the call out once a device of its own pins memory (`ram_block_discard_disable`). So a suppressed
//! one reports success. `MADV_DONTNEED` and `MADV_FREE` pass: on shared memory the first drops page-table entries and no
//! page, the second is refused by the kernel; on private memory, which no device of another process reaches,
//! allocators count on their effect.
#![expect(unsafe_code, reason = "hooks are called by C; one of the two places where it is allowed")]

mod guard;
mod serve;

use libc::{MADV_DONTFORK, MADV_REMOVE, c_int, c_long, c_ulong, c_void, off64_t, size_t};
use shim::Vm;
use shim::kvm::{CreateDevice, KVM_CREATE_DEVICE, KVM_CREATE_VM, KVM_DEV_TYPE_VFIO, KVM_RUN};

/// The VM of this process.
static VM: Vm = Vm::new();

/// What libc returns for what the kernel returned; `syscall` has set errno.
#[expect(clippy::cast_possible_truncation, reason = "as in libc, whose functions return an int")]
fn result(returned: c_long) -> c_int {
    returned as c_int
}

/// Fails as a system call does.
fn fail(errno: c_int) -> c_int {
    // SAFETY: the location is this thread's own, always there.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// C has `ioctl(int, unsigned long, ...)`. On the ABIs that Linux has for x86-64 and arm64 the third argument of a variadic
/// call is passed like a declared one.
///
/// # Safety
/// As `ioctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request == KVM_RUN {
        VM.vcpu_enters();
    } else if request == KVM_CREATE_VM || request == KVM_CREATE_DEVICE {
        // SAFETY: the caller's promise.
        return unsafe { create(fd, request, argument) };
    }
    // SAFETY: the caller's promise.
    result(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) })
}

/// The two requests of a VM's first moments; apart, so that the way of a vCPU through `ioctl` stays short.
///
/// # Safety
/// As `ioctl(2)`.
#[cold]
unsafe fn create(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request == KVM_CREATE_DEVICE {
        // SAFETY: the caller's promise.
        return unsafe { create_device(fd, argument) };
    }
    // SAFETY: the caller's promise.
    let vm = result(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) });
    if vm >= 0 {
        VM.vm_created(vm);
        serve::start();
    }
    vm
}

/// `KVM_CREATE_DEVICE`. A VM has one kvm-vfio device, which the VMM and the shim share, whoever comes first.
///
/// # Safety
/// `argument` is as `KVM_CREATE_DEVICE` wants it.
unsafe fn create_device(vm: c_int, argument: *mut c_void) -> c_int {
    let create: *mut CreateDevice = argument.cast();
    // SAFETY: the caller's promise: a structure to read and write, of a C compiler's alignment.
    let wanted = unsafe { *create };
    if (wanted.kind, wanted.flags) != (KVM_DEV_TYPE_VFIO, 0) {
        // SAFETY: the caller's promise.
        return result(unsafe { libc::syscall(libc::SYS_ioctl, vm, KVM_CREATE_DEVICE, argument) });
    }
    match VM.vfio_device(vm) {
        Ok(device) => {
            let fd = std::os::fd::IntoRawFd::into_raw_fd(device);
            // SAFETY: as above.
            unsafe { (*create).fd = fd.cast_unsigned() };
            0
        }
        Err(error) => fail(error.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// # Safety
/// As `madvise(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    // SAFETY: the caller's promise.
    let advise = || result(unsafe { libc::syscall(libc::SYS_madvise, address, length, advice) });
    match advice {
        MADV_REMOVE => VM.unless_pinned(advise).unwrap_or(0),
        MADV_DONTFORK => {
            serve::start();
            advise()
        }
        _ => advise(),
    }
}

/// # Safety
/// None; unsafe only as a symbol that replaces libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: off64_t, length: off64_t) -> c_int {
    // SAFETY: numbers only.
    let allocate = || result(unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, length) });
    if mode & libc::FALLOC_FL_PUNCH_HOLE == 0 { allocate() } else { guard::punch(fd, allocate) }
}

/// # Safety
/// None; unsafe only as a symbol that replaces libc's. `off_t` and `off64_t` are one type on 64-bit systems.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: off64_t, length: off64_t) -> c_int {
    // SAFETY: none is needed.
    unsafe { fallocate64(fd, mode, offset, length) }
}
