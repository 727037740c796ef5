//! The cost of the hook on each exit of a vCPU to the VMM: `ioctl(KVM_RUN)` of the preloaded library against libc's. The
//! descriptor is invalid, so that the kernel's part is as short as possible. The difference is the cost of the hook.
#![expect(unsafe_code, reason = "calls C functions by address")]

#[path = "../tests/library/mod.rs"]
mod library;

use std::ffi::{CStr, CString};
use std::hint::black_box;
use std::os::unix::ffi::OsStrExt;

use criterion::{Criterion, criterion_group, criterion_main};
use libc::{RTLD_LOCAL, RTLD_NOW, c_int, c_ulong, c_void};

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

const KVM_RUN: c_ulong = 0xae80;

fn ioctl_of(library: &CStr) -> Ioctl {
    // SAFETY: the library has no initializers but those of Rust and libc.
    let handle = unsafe { libc::dlopen(library.as_ptr(), RTLD_NOW | RTLD_LOCAL) };
    assert!(!handle.is_null(), "{library:?} can be loaded");
    // SAFETY: a handle from dlopen and a NUL-terminated name.
    let symbol = unsafe { libc::dlsym(handle, c"ioctl".as_ptr()) };
    assert!(!symbol.is_null(), "{library:?} has an ioctl");
    // SAFETY: `ioctl` can be called with this signature, variadic or not; see the hook.
    unsafe { std::mem::transmute::<*mut c_void, Ioctl>(symbol) }
}

fn ioctl(criterion: &mut Criterion) {
    let hooked = CString::new(library::path().as_os_str().as_bytes()).expect("a path without 0");
    let mut group = criterion.benchmark_group("ioctl(KVM_RUN), descriptor -1");
    for (name, ioctl) in [("libc", ioctl_of(c"libc.so.6")), ("hooked", ioctl_of(&hooked))] {
        // SAFETY: fails with EBADF before the other arguments are used.
        let run = || unsafe { ioctl(black_box(-1), KVM_RUN, std::ptr::null_mut()) };
        group.bench_function(name, |bench| bench.iter(run));
    }
    group.finish();
}

criterion_group!(benches, ioctl);
criterion_main!(benches);
