//! What the hook costs on every return of a vCPU to its VMM: the preloaded library's `ioctl(KVM_RUN)` against libc's, on a
//! descriptor that does not exist, so that the kernel's part is as short as can be. The difference is the hook's price.
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
    // SAFETY: a library whose initialisers do nothing but Rust's and libc's own.
    let handle = unsafe { libc::dlopen(library.as_ptr(), RTLD_NOW | RTLD_LOCAL) };
    assert!(!handle.is_null(), "{library:?} can be loaded");
    // SAFETY: a handle from dlopen and a name that ends in 0.
    let symbol = unsafe { libc::dlsym(handle, c"ioctl".as_ptr()) };
    assert!(!symbol.is_null(), "{library:?} has an ioctl");
    // SAFETY: C's ioctl, variadic or not, can be called like this; see the hook.
    unsafe { std::mem::transmute::<*mut c_void, Ioctl>(symbol) }
}

fn ioctl(criterion: &mut Criterion) {
    let hooked = CString::new(library::path().as_os_str().as_bytes()).expect("a path without 0");
    let mut group = criterion.benchmark_group("ioctl(KVM_RUN), descriptor -1");
    for (name, ioctl) in [("libc", ioctl_of(c"libc.so.6")), ("hooked", ioctl_of(&hooked))] {
        // SAFETY: EBADF whatever the rest.
        let run = || unsafe { ioctl(black_box(-1), KVM_RUN, std::ptr::null_mut()) };
        group.bench_function(name, |bench| bench.iter(run));
    }
    group.finish();
}

criterion_group!(benches, ioctl);
criterion_main!(benches);
