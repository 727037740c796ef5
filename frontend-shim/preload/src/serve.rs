//! Starts the server's thread at the first sign of a VM, in the process that has it. It does not start when the library is
//! loaded: a shell that starts the VMM, or a helper that the VMM starts, would serve as well.

use std::fmt;
use std::io::Write;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};

use shim::{Config, Server};

use crate::{VM, guard};

/// The process that serves; 0: none yet. With -daemonize QEMU forks before it creates a VM.
static SERVING: AtomicU32 = AtomicU32::new(0);

/// Starts the server, the first time in a process.
pub(crate) fn start() {
    let process = std::process::id();
    if SERVING.swap(process, Ordering::SeqCst) == process {
        return;
    }
    guard::prepare();
    match Config::from_variables(std::env::var_os, log_line) {
        Ok(Some(config)) => spawn(config),
        Ok(None) => log_line(format_args!("KVM_VFIO_SHIM_SOCKET is not set, so no backend can connect")),
        Err(error) => log_line(format_args!("{error}; not serving")),
    }
}

fn spawn(config: Config) {
    let server = match Server::new(&config, &VM) {
        Ok(server) => server,
        Err(error) => return log_line(format_args!("{}: {error}; not serving", config.socket.display())),
    };
    let mut server = server;
    let thread = std::thread::Builder::new().name("kvm-vfio-shim".into()).stack_size(256 << 10);
    let started = with_signals_blocked(|| thread.spawn(move || server.run()));
    if let Err(error) = started {
        log_line(format_args!("cannot start a thread: {error}; not serving"));
    }
}

/// A new thread inherits the signal mask, and the VMM's signal handlers must not run in the server's thread.
fn with_signals_blocked<T>(run: impl FnOnce() -> T) -> T {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: sigfillset and pthread_sigmask write the sets before anything reads them.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = run();
    // SAFETY: `before` was written above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

/// Writes one line to the VMM's log, in one write. `eprintln` would panic if the write failed.
fn log_line(line: fmt::Arguments<'_>) {
    _ = std::io::stderr().write_all(format!("kvm-vfio-shim: {line}\n").as_bytes());
}
