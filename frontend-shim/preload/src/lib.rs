//! The shim for a stock VMM: `LD_PRELOAD=libkvm_vfio_shim.so KVM_VFIO_SHIM_SOCKET=/run/vm1/kvm.sock qemu-system-x86_64 …`
//!
//! This library replaces four functions of libc. Each looks at its arguments, updates or queries [`Vm`], and makes the system
//! call itself. It does not look up libc's function by `dlsym`: a call before this library is initialized would find none. A
//! hook does not allocate, takes no lock on a vCPU thread, and cannot panic.
//!
//! | function | call | effect |
//! |---|---|---|
//! | `ioctl` | `KVM_RUN` | one compare; the time of the first one is stored |
//! | | `KVM_CREATE_VM` | stores the VM, starts the server's thread |
//! | | `KVM_CREATE_DEVICE(VFIO)` | returns the VM's only kvm-vfio device, whether QEMU or the shim has created it |
//! | `madvise` | `MADV_REMOVE` | does nothing while a device can access guest memory |
//! | | `MADV_DONTFORK` | starts the server's thread: the VMM has guest memory (TCG creates no VM) |
//! | `fallocate`, `fallocate64` | a hole in a file | punches none in guest memory while a device can access it, see [`guard`] |
//!
//! A suppressed discard reports success. virtio-balloon and free page reporting ignore the result, and QEMU itself skips the
//! call once a device of its own pins memory (`ram_block_discard_disable`). `MADV_DONTNEED` and `MADV_FREE` are not suppressed.
//! On shared memory the first drops page-table entries but no page, and the kernel refuses the second. On private memory,
//! which no device of another process can access, allocators rely on their effect.
#![expect(unsafe_code, reason = "hooks are called by C; one of the two places where it is allowed")]

mod guard;
mod serve;

use libc::{MADV_DONTFORK, MADV_REMOVE, c_int, c_long, c_ulong, c_void, off64_t, size_t};
use shim::Vm;
use shim::kvm::{CreateDevice, KVM_CREATE_DEVICE, KVM_CREATE_VM, KVM_DEV_TYPE_VFIO, KVM_RUN};

/// The VM of this process.
static VM: Vm = Vm::new();

/// Converts the result of `syscall`, which has set errno, to that of the libc function.
#[expect(clippy::cast_possible_truncation, reason = "as in libc, whose functions return an int")]
fn result(returned: c_long) -> c_int {
    returned as c_int
}

/// Sets errno and returns -1.
fn fail(errno: c_int) -> c_int {
    // SAFETY: the location belongs to this thread and is always valid.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// In C it is `ioctl(int, unsigned long, ...)`. In Linux's ABIs for x86-64 and arm64 a variadic argument is passed like a
/// declared one.
///
/// # Safety
/// As `ioctl(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request == KVM_RUN {
        VM.vcpu_enters();
    } else if request == KVM_CREATE_VM || request == KVM_CREATE_DEVICE {
        // SAFETY: guaranteed by the caller.
        return unsafe { create(fd, request, argument) };
    }
    // SAFETY: guaranteed by the caller.
    result(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) })
}

/// The two requests at the start of a VM. A separate function keeps the path of `KVM_RUN` through `ioctl` short.
///
/// # Safety
/// As `ioctl(2)`.
#[cold]
unsafe fn create(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if request == KVM_CREATE_DEVICE {
        // SAFETY: guaranteed by the caller.
        return unsafe { create_device(fd, argument) };
    }
    // SAFETY: guaranteed by the caller.
    let vm = result(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) });
    if vm >= 0 {
        VM.vm_created(vm);
        serve::start();
    }
    vm
}

/// `KVM_CREATE_DEVICE`. A VM has one kvm-vfio device, which the VMM and the shim share.
///
/// # Safety
/// `argument` is as `KVM_CREATE_DEVICE` expects it.
unsafe fn create_device(vm: c_int, argument: *mut c_void) -> c_int {
    let create: *mut CreateDevice = argument.cast();
    // SAFETY: the caller passes a valid, aligned structure that may be read and written.
    let wanted = unsafe { *create };
    if (wanted.kind, wanted.flags) != (KVM_DEV_TYPE_VFIO, 0) {
        // SAFETY: guaranteed by the caller.
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
    // SAFETY: guaranteed by the caller.
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
    // SAFETY: all arguments are integers.
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
